// Linear layers against fp64, and that autograd keeps the weight itself, not a copy.
#include "kernels/linear.hpp"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/instruction_set.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

struct LinearCase {
  std::int64_t tokens, in, out;
  bool has_bias;
};

TEST(Linear, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (const LinearCase& c : {LinearCase{1, 1, 1, true},
                              {3, 5, 7, true},
                              {1, 33, 2, false},
                              {65, 48, 17, true},
                              {130, 384, 96, true},
                              {2, 1003, 31, false},
                              {70, 1100, 549, true},
                              {1030, 40, 33, true},
                              {0, 8, 4, true}})
    for (const at::ScalarType dtype : kDtypes) {
      const at::Tensor given_x = random_tensor(1, {c.tokens, c.in}, dtype),
                       given_w = random_tensor(2, {c.out, c.in}, dtype);
      const at::Tensor given_b = random_tensor(3, {c.out}, dtype), seed = random_tensor(4, {c.tokens, c.out}, dtype);
      const at::Tensor x = leaf(given_x), w = leaf(given_w), b = leaf(given_b);
      const at::Tensor y = apply_linear(x, w, c.has_bias ? b : at::Tensor());
      const std::string what = fmt::format("[{}, {}] -> {} {}", c.tokens, c.in, c.out, unit_of(dtype));
      EXPECT_EQ(y.scalar_type(), dtype);
      // Sums in fp32 whatever their order; a library may store the product in bf16 before it adds the bias.
      const at::Tensor ax = magnitude(given_x), aw = magnitude(given_w), g = exact(seed), ag = magnitude(seed);
      const at::Tensor product = at::mm(exact(given_x), exact(given_w).t());
      const auto sums = [](std::int64_t terms) { return kUnit * static_cast<double>(terms + 2); };
      const at::Tensor bias = c.has_bias ? exact(given_b) : at::zeros({c.out}, at::kDouble);
      expect_within(y, product + bias, sums(c.in) * (at::mm(ax, aw.t()) + bias.abs()) + unit_of(dtype) * product.abs(),
                    what);
      const auto grads = gradients(y, seed, {x, w, b});
      expect_within(grads[0], at::mm(g, exact(given_w)), sums(c.out) * at::mm(ag, aw), what + " dx");
      expect_within(grads[1], at::mm(g.t(), exact(given_x)), sums(c.tokens) * at::mm(ag.t(), ax), what + " dw");
      if (c.has_bias) expect_within(grads[2], g.sum(0), sums(c.tokens) * ag.sum(0), what + " db");
    }
}

TEST(Linear, WeightsStoredTransposedGetTheirGradientInTheirLayout) {
  const at::Tensor given_x = random_tensor(1, {75, 90}, at::kBFloat16);
  const at::Tensor given_w = random_tensor(2, {70, 90}, at::kBFloat16);
  const at::Tensor seed = random_tensor(3, {75, 70}, at::kBFloat16);
  const auto weight_gradient = [&](bool is_transposed) {
    const at::Tensor w = leaf(is_transposed ? given_w.t().contiguous() : given_w);
    return gradients(apply_linear(given_x, is_transposed ? w.t() : w), seed, {w})[0];
  };
  EXPECT_TRUE(weight_gradient(true).is_contiguous());
  expect_same_bits_for_any_thread_count([&] { return std::vector<at::Tensor>{weight_gradient(true)}; }, "dw");
  // ATen's products may add in another order in the other layout; their values are tested above.
  if (instruction_set() < InstructionSet::avx512_bf16) return;
  expect_same_bits(weight_gradient(true), weight_gradient(false).t(), "dw");
}

TEST(Linear, BiasGradientOfBf16IsSummedInFp32) {
  const at::Tensor x = leaf(at::ones({5000, 2}, at::kBFloat16)), w = leaf(at::ones({3, 2}, at::kBFloat16));
  const at::Tensor b = leaf(at::zeros({3}, at::kBFloat16)), y = apply_linear(x, w, b);
  const auto grads = gradients(y, at::ones_like(y), {w, b});
  for (const at::Tensor& grad : grads)
    expect_within(grad, at::full(grad.sizes(), 5000.0, at::kDouble), at::zeros({1}, at::kDouble), "sum of 5000 ones");
}

TEST(Linear, BackwardReadsTheWeightOfThatMoment) {
  // A sharded weight is freed after forward and gathered again before backward: a saved copy would defeat that.
  const at::Tensor x = leaf(random_tensor(1, {4, 6})), w = leaf(random_tensor(2, {5, 6})), b = leaf(at::zeros({5}));
  const at::Tensor seed = random_tensor(3, {4, 5}), y = apply_linear(x, w, b);
  w.variable_data().mul_(2);
  expect_within(gradients(y, seed, {x})[0], at::mm(exact(seed), exact(w)),
                8 * kUnit * at::mm(magnitude(seed), magnitude(w)), "dx");
}

// Long sums are what a library shares among threads: over inputs (y), outputs (dx), tokens (dw).
TEST(Linear, TheNumberOfThreadsDoesNotChangeABit) {
  for (const LinearCase& c :
       {LinearCase{3000, 100, 90, true}, {2100, 768, 8, false}, {50, 2600, 70, true}, {70, 30, 2500, true}})
    for (const at::ScalarType dtype : kDtypes)
      expect_same_bits_for_any_thread_count(
          [&] {
            const at::Tensor x = leaf(random_tensor(1, {c.tokens, c.in}, dtype)),
                             w = leaf(random_tensor(2, {c.out, c.in}, dtype));
            const at::Tensor b = leaf(random_tensor(3, {c.out}, dtype)),
                             y = apply_linear(x, w, c.has_bias ? b : at::Tensor());
            auto all = gradients(y, random_tensor(4, {c.tokens, c.out}, dtype), {x, w});
            all.push_back(y);
            return all;
          },
          fmt::format("[{}, {}] -> {} {}", c.tokens, c.in, c.out, unit_of(dtype)));
}

TEST(Linear, RepeatedRunsGiveTheSameBits) {
  for (const at::ScalarType dtype : kDtypes) {
    const auto compute = [&] {
      const at::Tensor x = leaf(random_tensor(1, {300, 129}, dtype)), w = leaf(random_tensor(2, {257, 129}, dtype));
      const at::Tensor b = leaf(random_tensor(3, {257}, dtype)), y = apply_linear(x, w, b);
      auto all = gradients(y, random_tensor(4, {300, 257}, dtype), {x, w, b});
      all.push_back(y);
      return all;
    };
    expect_same_bits_when_repeated(compute, "linear");
  }
}

}  // namespace
}  // namespace shardtune::testing
