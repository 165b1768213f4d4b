// AdamW against the formula of torch.optim.AdamW in plain ATen, and the promise that cutting changes no bit.
#include <cmath>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/rng.hpp"
#include "kernels/adamw.hpp"

namespace shardtune {
namespace {

at::Tensor random_tensor(std::uint64_t key, std::int64_t numel, double deviation) {
  PhiloxStream random(key);
  at::Tensor tensor = at::empty({numel}, at::kFloat);
  for (std::int64_t i = 0; i < numel; ++i) {
    tensor.mutable_data_ptr<float>()[i] = static_cast<float>(deviation * random.next_normal());
  }
  return tensor;
}

AdamWSlice start_state(std::int64_t numel) {
  return {random_tensor(1, numel, 0.1), at::zeros({numel}), at::zeros({numel}), {}};
}

at::Tensor gradient(std::int64_t step, std::int64_t numel) {
  return random_tensor(mix_key(2, static_cast<std::uint64_t>(step)), numel, 1.0 / static_cast<double>(1 + step % 7));
}

// torch/optim/adamw.py, _single_tensor_adamw, its operations one by one.
void torch_step(AdamWSlice& s, const AdamWOptions& o) {
  const auto t = static_cast<double>(o.step);
  s.param.mul_(1.0 - o.lr * o.weight_decay);
  s.exp_avg.lerp_(s.grad, 1.0 - o.beta1);
  s.exp_avg_sq.mul_(o.beta2).addcmul_(s.grad, s.grad, 1.0 - o.beta2);
  const double step_size = o.lr / (1.0 - std::pow(o.beta1, t));
  const at::Tensor denominator = (s.exp_avg_sq.sqrt() / std::sqrt(1.0 - std::pow(o.beta2, t))).add_(o.eps);
  s.param.addcdiv_(s.exp_avg, denominator, -step_size);
}

void expect_follows_torch(AdamWOptions options, std::int64_t num_steps) {
  constexpr std::int64_t kNumel = 1003;
  AdamWSlice own = start_state(kNumel);
  AdamWSlice reference = start_state(kNumel);
  for (std::int64_t step = 1; step <= num_steps; ++step) {
    options.step = step;
    own.grad = reference.grad = gradient(step, kNumel);
    adamw_step(own, options);
    torch_step(reference, options);
  }
  EXPECT_TRUE(at::allclose(own.param, reference.param, 1e-5, 1e-6));
  EXPECT_TRUE(at::allclose(own.exp_avg, reference.exp_avg, 1e-5, 1e-6));
  EXPECT_TRUE(at::allclose(own.exp_avg_sq, reference.exp_avg_sq, 1e-5, 1e-9));
  EXPECT_FALSE(at::allclose(own.param, start_state(kNumel).param, 1e-2, 1e-2)) << "nothing was learnt";
}

TEST(AdamW, FollowsTorchToRoundingOverAThousandSteps) {
  expect_follows_torch({.lr = 1e-3, .weight_decay = 0.01}, 1000);
  expect_follows_torch({.lr = 1e-3, .weight_decay = 0.0}, 1000);
}

TEST(AdamW, FollowsTorchWithUnusualBetas) {
  expect_follows_torch({.lr = 1e-3, .beta1 = 0.3, .beta2 = 0.95, .eps = 1e-6, .weight_decay = 0.1}, 200);
}

TEST(AdamW, OneStepIsTheFormulaOperationByOperation) {
  // In float with every operation rounded; volatile keeps the compiler from contracting this side.
  constexpr std::int64_t kNumel = 517;
  AdamWSlice s = start_state(kNumel);
  s.exp_avg = random_tensor(8, kNumel, 0.1);
  s.exp_avg_sq = random_tensor(9, kNumel, 0.1).square();
  s.grad = gradient(3, kNumel);
  AdamWSlice before{s.param.clone(), s.exp_avg.clone(), s.exp_avg_sq.clone(), s.grad.clone()};
  const AdamWOptions o{.lr = 2e-3, .weight_decay = 0.02, .step = 3, .grad_scale = 0.37};
  adamw_step(s, o);
  EXPECT_TRUE(at::equal(s.grad, before.grad)) << "the gradient is not written";
  for (std::int64_t i = 0; i < kNumel; ++i) {
    const volatile float g = before.grad.const_data_ptr<float>()[i] * static_cast<float>(o.grad_scale);
    const float m = before.exp_avg.const_data_ptr<float>()[i];
    const volatile float difference = g - m;
    const volatile float m_change = static_cast<float>(1.0 - o.beta1) * difference;
    const volatile float new_m = m + m_change;
    const volatile float v_kept = before.exp_avg_sq.const_data_ptr<float>()[i] * static_cast<float>(o.beta2);
    const volatile float g_part = static_cast<float>(1.0 - o.beta2) * g;
    const volatile float v_change = g_part * g;
    const volatile float new_v = v_kept + v_change;
    const volatile float root =
        std::sqrt(static_cast<float>(new_v)) / static_cast<float>(std::sqrt(1.0 - std::pow(o.beta2, 3.0)));
    const volatile float denominator = root + static_cast<float>(o.eps);
    const volatile float decayed =
        before.param.const_data_ptr<float>()[i] * static_cast<float>(1.0 - o.lr * o.weight_decay);
    const volatile float numerator = static_cast<float>(-(o.lr / (1.0 - std::pow(o.beta1, 3.0)))) * new_m;
    const volatile float change = numerator / denominator;
    const volatile float wanted = decayed + change;
    ASSERT_EQ(s.exp_avg.const_data_ptr<float>()[i], new_m) << i;
    ASSERT_EQ(s.exp_avg_sq.const_data_ptr<float>()[i], new_v) << i;
    ASSERT_EQ(s.param.const_data_ptr<float>()[i], wanted) << i;
  }
}

TEST(AdamW, CuttingTheTensorsChangesNoBit) {
  constexpr std::int64_t kNumel = 10'007;
  for (const std::vector<std::int64_t>& cuts :
       {std::vector<std::int64_t>{1, 3}, {5000}, {17, 4096, 4097, 9999}, {0, 256, 10'000}}) {
    AdamWSlice whole = start_state(kNumel);
    AdamWSlice cut = start_state(kNumel);
    for (std::int64_t step = 1; step <= 5; ++step) {
      const AdamWOptions options{.lr = 1e-2, .weight_decay = 0.1, .step = step, .grad_scale = 0.7};
      whole.grad = cut.grad = gradient(step, kNumel);
      adamw_step(whole, options);
      std::vector<std::int64_t> ends = cuts;
      ends.push_back(kNumel);
      std::int64_t begin = 0;
      for (const std::int64_t end : ends) {
        const auto part = [&](const at::Tensor& tensor) { return tensor.narrow(0, begin, end - begin); };
        adamw_step({part(cut.param), part(cut.exp_avg), part(cut.exp_avg_sq), part(cut.grad)}, options);
        begin = end;
      }
    }
    EXPECT_TRUE(at::equal(whole.param, cut.param));
    EXPECT_TRUE(at::equal(whole.exp_avg, cut.exp_avg));
    EXPECT_TRUE(at::equal(whole.exp_avg_sq, cut.exp_avg_sq));
  }
}

TEST(AdamW, TheCopyIsTheNewParameterRounded) {
  for (const std::int64_t numel : {1, 16, 2047, 2049, 100'003}) {
    for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
      const AdamWOptions options{.lr = 1e-2, .weight_decay = 0.1};
      AdamWSlice without = start_state(numel);
      AdamWSlice with = start_state(numel);
      without.grad = with.grad = gradient(1, numel);
      with.rounded = at::zeros({numel}, dtype);
      adamw_step(without, options);
      adamw_step(with, options);
      EXPECT_TRUE(at::equal(with.param, without.param));
      EXPECT_TRUE(at::equal(with.exp_avg_sq, without.exp_avg_sq));
      EXPECT_TRUE(at::equal(with.rounded, with.param.to(dtype))) << numel << " " << dtype;
    }
  }
  const AdamWSlice s = start_state(8);
  for (const at::Tensor& misfit : {at::zeros({8}), at::zeros({7}, at::kBFloat16)})
    EXPECT_THROW(adamw_step({s.param, s.exp_avg, s.exp_avg_sq, at::zeros({8}), 0, misfit}, {}), Error);
}

AdamWSlice with_bf16_moments(AdamWSlice s) {
  s.exp_avg = s.exp_avg.to(at::kBFloat16);
  s.exp_avg_sq = s.exp_avg_sq.to(at::kBFloat16);
  return s;
}

TEST(AdamW, Bf16MomentsStayCloseToFp32Ones) {
  constexpr std::int64_t kNumel = 4003;
  AdamWSlice own = with_bf16_moments(start_state(kNumel));
  AdamWSlice reference = start_state(kNumel);
  for (std::int64_t step = 1; step <= 300; ++step) {
    own.grad = reference.grad = gradient(step, kNumel);
    const AdamWOptions options{.lr = 1e-3, .weight_decay = 0.01, .step = step, .rounding_key = 7};
    adamw_step(own, options);
    adamw_step(reference, options);
  }
  const auto distance = [&](const at::Tensor& a, const at::Tensor& b) {
    return ((a.to(at::kFloat) - b).norm() / b.norm()).item<double>();
  };
  EXPECT_LT(distance(own.exp_avg, reference.exp_avg), 0.01);
  EXPECT_LT(distance(own.exp_avg_sq, reference.exp_avg_sq), 0.1);
  const at::Tensor start = start_state(kNumel).param;
  EXPECT_LT(distance(own.param - start, reference.param - start), 0.03);
}

TEST(AdamW, ABf16SecondMomentDecaysAtTheRightRate) {
  // Rounded to nearest it would stay at its first value: 0.1 % is less than half of a step of bf16.
  constexpr std::int64_t kNumel = 20'000;
  AdamWSlice s = with_bf16_moments(start_state(kNumel));
  s.exp_avg_sq.fill_(1.0);
  s.grad = at::zeros({kNumel});
  for (std::int64_t step = 1; step <= 1000; ++step) adamw_step(s, {.step = step, .rounding_key = 3});
  const double mean = s.exp_avg_sq.to(at::kFloat).mean().item<double>();
  EXPECT_NEAR(mean, std::pow(0.999, 1000.0), 0.01);
}

TEST(AdamW, CuttingBf16MomentsChangesNoBit) {
  constexpr std::int64_t kNumel = 10'007;
  AdamWSlice whole = with_bf16_moments(start_state(kNumel));
  AdamWSlice cut = with_bf16_moments(start_state(kNumel));
  for (std::int64_t step = 1; step <= 5; ++step) {
    const AdamWOptions options{.lr = 1e-2, .step = step, .rounding_key = 99, .grad_scale = 0.7};
    whole.grad = cut.grad = gradient(step, kNumel);
    adamw_step(whole, options);
    for (const auto& [begin, end] : {std::pair<std::int64_t, std::int64_t>{0, 17}, {17, 5000}, {5000, kNumel}}) {
      const auto part = [&, b = begin, e = end](const at::Tensor& tensor) { return tensor.narrow(0, b, e - b); };
      adamw_step({part(cut.param), part(cut.exp_avg), part(cut.exp_avg_sq), part(cut.grad), begin}, options);
    }
  }
  EXPECT_TRUE(at::equal(whole.param, cut.param));
  EXPECT_TRUE(at::equal(whole.exp_avg, cut.exp_avg));
  EXPECT_TRUE(at::equal(whole.exp_avg_sq, cut.exp_avg_sq));
  EXPECT_FALSE(at::equal(whole.exp_avg_sq, at::zeros_like(whole.exp_avg_sq)));
}

TEST(AdamW, TheNumberOfThreadsChangesNoBit) {
  constexpr std::int64_t kNumel = 200'003;
  std::vector<at::Tensor> results;
  for (const int threads : {1, 2, 3}) {
    at::set_num_threads(threads);
    AdamWSlice s = start_state(kNumel);
    s.grad = gradient(1, kNumel);
    adamw_step(s, {.weight_decay = 0.1});
    results.push_back(s.param);
  }
  at::set_num_threads(1);
  EXPECT_TRUE(at::equal(results[0], results[1]));
  EXPECT_TRUE(at::equal(results[0], results[2]));
}

TEST(AdamW, EmptySlicesAreFineAndMisfitsAreRefused) {
  AdamWSlice empty{at::empty({0}), at::empty({0}), at::empty({0}), at::empty({0})};
  EXPECT_NO_THROW(adamw_step(empty, {}));
  AdamWSlice s = start_state(8);
  s.grad = at::zeros({9});
  EXPECT_THROW(adamw_step(s, {}), Error);
  s.grad = at::zeros({8}, at::kBFloat16);
  EXPECT_THROW(adamw_step(s, {}), Error);
  s.grad = at::zeros({16}).slice(0, 0, 16, 2);
  EXPECT_THROW(adamw_step(s, {}), Error);
  s.grad = at::zeros({8});
  EXPECT_THROW(adamw_step(s, {.step = 0}), Error);
}

}  // namespace
}  // namespace shardtune
