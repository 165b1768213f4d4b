// SGD operation by operation, and the promise that cutting changes no bit. Against torch: tests/models.
#include "kernels/sgd.hpp"

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

constexpr SgdOptions kVariants[] = {
    {.lr = 0.1},
    {.lr = 0.1, .weight_decay = 0.03, .grad_scale = 0.37},
    {.lr = 0.1, .momentum = 0.9, .grad_scale = 0.37},
    {.lr = 0.1, .momentum = 0.9, .weight_decay = 0.03},
    {.lr = 0.1, .momentum = 0.7, .weight_decay = 0.03, .nesterov = true, .grad_scale = 0.37},
};

SgdSlice start_state(std::int64_t numel, const SgdOptions& options) {
  return {random_tensor(1, {numel}), options.momentum != 0.0 ? random_tensor(2, {numel}) : at::Tensor(),
          random_tensor(3, {numel})};
}

TEST(Sgd, OneStepIsTheFormulaOperationByOperation) {
  constexpr std::int64_t kNumel = 517;
  for (const SgdOptions& o : kVariants) {
    const SgdSlice before = start_state(kNumel, o);
    const SgdSlice s = start_state(kNumel, o);
    sgd_step(s, o);
    expect_same_bits(s.grad, before.grad, "the gradient is not written");
    for (std::int64_t i = 0; i < kNumel; ++i) {
      // In float with every operation rounded; volatile keeps the compiler from contracting this side.
      const float p = before.param.const_data_ptr<float>()[i];
      volatile float g = before.grad.const_data_ptr<float>()[i] * static_cast<float>(o.grad_scale);
      const volatile float decay = static_cast<float>(o.weight_decay) * p;
      g = g + decay;
      if (o.momentum != 0.0) {
        const volatile float kept = before.momentum_buffer.const_data_ptr<float>()[i] * static_cast<float>(o.momentum);
        const volatile float b = kept + g;
        ASSERT_EQ(s.momentum_buffer.const_data_ptr<float>()[i], b) << i;
        const volatile float ahead = static_cast<float>(o.momentum) * b;
        g = o.nesterov ? g + ahead : b;
      }
      const volatile float change = static_cast<float>(-o.lr) * g;
      const volatile float wanted = p + change;
      ASSERT_EQ(s.param.const_data_ptr<float>()[i], wanted) << i;
    }
  }
}

TEST(Sgd, CuttingTheTensorsChangesNoBit) {
  constexpr std::int64_t kNumel = 10'007;
  for (const SgdOptions& o : kVariants) {
    const SgdSlice whole = start_state(kNumel, o);
    const SgdSlice cut = start_state(kNumel, o);
    for (int step = 0; step < 5; ++step) {
      sgd_step(whole, o);
      std::int64_t begin = 0;
      for (const std::int64_t end : {std::int64_t{1}, std::int64_t{18}, std::int64_t{5000}, kNumel}) {
        const auto part = [&](const at::Tensor& t) { return t.defined() ? t.narrow(0, begin, end - begin) : t; };
        sgd_step({part(cut.param), part(cut.momentum_buffer), part(cut.grad)}, o);
        begin = end;
      }
    }
    expect_same_bits(whole.param, cut.param, "parameters");
    if (o.momentum != 0.0) expect_same_bits(whole.momentum_buffer, cut.momentum_buffer, "momentum");
  }
}

TEST(Sgd, TheCopyIsTheNewParameterRounded) {
  constexpr std::int64_t kNumel = 70'003;
  for (const SgdOptions& o : kVariants) {
    for (const at::ScalarType dtype : {at::kBFloat16, at::kHalf}) {
      const SgdSlice without = start_state(kNumel, o);
      SgdSlice with = start_state(kNumel, o);
      with.rounded = at::zeros({kNumel}, dtype);
      sgd_step(without, o);
      sgd_step(with, o);
      expect_same_bits(with.param, without.param, "parameters");
      expect_same_bits(with.rounded, with.param.to(dtype), "copy");
    }
  }
}

TEST(Sgd, TheNumberOfThreadsChangesNoBit) {
  const SgdOptions& o = kVariants[4];
  expect_same_bits_for_any_thread_count(
      [&] {
        const SgdSlice s = start_state(200'003, o);
        sgd_step(s, o);
        return std::vector<at::Tensor>{s.param, s.momentum_buffer};
      },
      "sgd");
}

TEST(Sgd, EmptySlicesAreFineAndMisfitsAreRefused) {
  EXPECT_NO_THROW(sgd_step({at::empty({0}), at::empty({0}), at::empty({0})}, {.momentum = 0.5}));
  const at::Tensor eight = at::zeros({8});
  EXPECT_THROW(sgd_step({eight, {}, at::zeros({9})}, {}), Error);
  EXPECT_THROW(sgd_step({eight, {}, at::zeros({8}, at::kBFloat16)}, {}), Error);
  EXPECT_THROW(sgd_step({eight, {}, at::zeros({16}).slice(0, 0, 16, 2)}, {}), Error);
  EXPECT_THROW(sgd_step({eight, {}, eight.clone()}, {.momentum = 0.5}), Error) << "no buffer";
  EXPECT_THROW(sgd_step({eight, eight.clone(), eight.clone()}, {}), Error) << "a buffer that nobody wants";
  EXPECT_THROW(sgd_step({eight, {}, eight.clone()}, {.nesterov = true}), Error) << "nesterov without momentum";
}

}  // namespace
}  // namespace shardtune::testing
