// The optimizers against what torch.optim made of the same vector (tests/golden/make_golden.py, `optimizers`).
#include <functional>
#include <map>
#include <string>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/adamw.hpp"
#include "kernels/sgd.hpp"
#include "tests/models/golden.hpp"

namespace shardtune::testing {
namespace {

using Tensors = std::map<std::string, at::Tensor>;
using Step = std::function<void(const at::Tensor& gradient, std::int64_t step)>;

// To the rounding of fp32: ATen contracts some operations to fused multiply-adds, the kernels never do.
void expect_close(const at::Tensor& own, const at::Tensor& wanted, const std::string& what) {
  EXPECT_TRUE(at::allclose(own, wanted, 1e-5, 1e-6))
      << what << " is off by up to " << (own - wanted).abs().max().item<double>();
}

// Takes num_steps steps of `parameter` (given as the start) and compares it wherever torch's was recorded.
void expect_follows(const std::string& name, const Tensors& golden, const at::Tensor& parameter, std::int64_t num_steps,
                    const Step& step_with) {
  int num_compared = 0;
  for (std::int64_t step = 1; step <= num_steps; ++step) {
    step_with(golden.at("curvature") * (parameter - golden.at("target").roll(step)), step);
    const std::string key = fmt::format("{}.{}", name, step);
    if (!golden.contains(key)) continue;
    expect_close(parameter, golden.at(key), key);
    ++num_compared;
  }
  EXPECT_EQ(num_compared, 3);
  EXPECT_GT((parameter - golden.at("start")).abs().mean().item<double>(), 0.1) << "nothing has moved";
}

void expect_adamw_follows(const std::string& name, AdamWOptions options) {
  const Tensors golden = load_golden_tensors("optimizers");
  AdamWSlice slice{golden.at("start").clone(), at::zeros({517}), at::zeros({517}), {}};
  expect_follows(name, golden, slice.param, 1000, [&](const at::Tensor& gradient, std::int64_t step) {
    slice.grad = gradient;
    options.step = step;
    adamw_step(slice, options);
  });
  expect_close(slice.exp_avg, golden.at(name + ".exp_avg"), name);
  expect_close(slice.exp_avg_sq, golden.at(name + ".exp_avg_sq"), name);
}

void expect_sgd_follows(const std::string& name, const SgdOptions& options) {
  const Tensors golden = load_golden_tensors("optimizers");
  const bool has_momentum = options.momentum != 0.0;
  SgdSlice slice{golden.at("start").clone(), has_momentum ? at::zeros({517}) : at::Tensor(), {}};
  expect_follows(name, golden, slice.param, 200, [&](const at::Tensor& gradient, std::int64_t) {
    slice.grad = gradient;
    sgd_step(slice, options);
  });
  EXPECT_EQ(golden.contains(name + ".momentum_buffer"), has_momentum);
  if (has_momentum) expect_close(slice.momentum_buffer, golden.at(name + ".momentum_buffer"), name);
}

TEST(TorchOptimizer, AdamWIsFollowedOverAThousandSteps) {
  expect_adamw_follows("adamw", {.lr = 1e-3, .weight_decay = 0.01});
}

TEST(TorchOptimizer, AdamWWithOtherBetasIsFollowedOverAThousandSteps) {
  expect_adamw_follows("adamw_other_betas",
                       {.lr = 3e-3, .beta1 = 0.4, .beta2 = 0.95, .eps = 1e-6, .weight_decay = 0.1});
}

TEST(TorchOptimizer, SgdIsFollowedOverTwoHundredSteps) {
  expect_sgd_follows("sgd", {.lr = 0.05});
  expect_sgd_follows("sgd_decay", {.lr = 0.05, .weight_decay = 0.02});
  expect_sgd_follows("sgd_momentum", {.lr = 0.02, .momentum = 0.9, .weight_decay = 0.02});
  expect_sgd_follows("sgd_nesterov", {.lr = 0.02, .momentum = 0.8, .weight_decay = 0.02, .nesterov = true});
}

}  // namespace
}  // namespace shardtune::testing
