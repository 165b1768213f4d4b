// Rotary positions: tables and rotation against fp64, the backward pass is the transpose.
#include "kernels/rope.hpp"

#include <cmath>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

RopeTables tables_for(std::int64_t tokens, std::int64_t half) {
  const at::Tensor frequencies = at::pow(10000.0, -at::arange(half, at::kFloat) / static_cast<double>(half));
  return make_rope_tables(at::arange(tokens, at::kLong), frequencies);
}

TEST(Rope, TablesAreCosineAndSineOfFp32Angles) {
  const at::Tensor positions = at::tensor({0, 1, 17, 4095}, at::kLong);
  const at::Tensor frequencies = at::tensor({1.0F, 0.1F, 0.00123F});
  const RopeTables tables = make_rope_tables(positions, frequencies);
  for (std::int64_t t = 0; t < 4; ++t)
    for (std::int64_t i = 0; i < 3; ++i) {
      const float angle = static_cast<float>(positions[t].item<std::int64_t>()) * frequencies[i].item<float>();
      EXPECT_NEAR(tables.cos[t][i].item<double>(), std::cos(static_cast<double>(angle)), 2 * kUnit) << t << " " << i;
      EXPECT_NEAR(tables.sin[t][i].item<double>(), std::sin(static_cast<double>(angle)), 2 * kUnit) << t << " " << i;
    }
}

TEST(Rope, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (const std::vector<std::int64_t>& shape :
       std::vector<std::vector<std::int64_t>>{{0, 2, 8}, {1, 1, 2}, {3, 2, 6}, {17, 3, 32}, {33, 1, 66}, {5, 4, 200}})
    for (const at::ScalarType dtype : kDtypes) {
      const RopeTables tables = tables_for(shape[0], shape[2] / 2);
      const at::Tensor given = random_tensor(1, shape, dtype), seed = random_tensor(2, shape, dtype);
      const at::Tensor x = leaf(given), exact_x = double_leaf(given);
      const RopeTables exact_tables{exact(tables.cos), exact(tables.sin)};
      const at::Tensor y = rope(x, tables), wanted = rope_reference(exact_x, exact_tables);
      const std::string what = fmt::format("[{}, {}, {}]", shape[0], shape[1], shape[2]);
      EXPECT_EQ(y.scalar_type(), dtype);
      // Three roundings of a cos + b sin with |cos|, |sin| <= 1; the pair of element i is i + D / 2.
      const auto pair_size = [&](const at::Tensor& v) { return magnitude(v) + magnitude(v.roll(shape[2] / 2, -1)); };
      expect_within(y, wanted, 3 * kUnit * pair_size(given), what);
      expect_within(gradients(y, seed, {x})[0], gradients(wanted, exact(seed), {exact_x})[0],
                    3 * kUnit * pair_size(seed), what + " dx");
    }
}

TEST(Rope, StridesAndThreadCountChangeNoBit) {
  const RopeTables tables = tables_for(100, 33);
  const at::Tensor fused = random_tensor(1, {100, 3, 2, 66}), seed = random_tensor(2, {100, 2, 66});
  const auto compute = [&](bool dense) {
    const at::Tensor part = fused.select(1, 1);  // as a query inside a fused projection
    const at::Tensor x = (dense ? part.contiguous() : part).detach().requires_grad_(true);
    const at::Tensor y = rope(x, tables);
    return std::vector<at::Tensor>{y, gradients(y, seed, {x})[0]};
  };
  const auto dense = compute(true), strided = compute(false);
  expect_same_bits(strided[0], dense[0], "y");
  expect_same_bits(strided[1], dense[1], "dx");
  expect_same_bits_for_any_thread_count([&] { return compute(true); }, "rope");
}

TEST(Rope, TablesThatDoNotFitAreRefused) {
  EXPECT_THROW(rope(at::zeros({3, 1, 8}), tables_for(3, 3)), Error);
  EXPECT_THROW(rope(at::zeros({3, 1, 8}), tables_for(4, 4)), Error);
}

}  // namespace
}  // namespace shardtune::testing
