// fp32 products in blocks against fp64, on every processor with AVX-512, preferred there or not.
#include "kernels/fp32_gemm.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <vector>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/instruction_set.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

// Where there is nothing to test, linear_test.cpp holds what is used instead to the same bounds.
bool is_available() { return instruction_set() >= InstructionSet::avx512; }

at::Tensor laid_out(const at::Tensor& x, bool has_dense_rows) { return has_dense_rows ? x : x.t().contiguous().t(); }

// An element's error comes from the additions within a chunk of at most 384 terms, those of chunks, and one of the
// bias.
at::Tensor slack(const at::Tensor& left, const at::Tensor& right) {
  const std::int64_t k = left.size(1), additions = std::min<std::int64_t>(k, 384) + k / 350 + 2;
  return kUnit * static_cast<double>(additions) * at::mm(magnitude(left), magnitude(right));
}

TEST(Fp32Gemm, ValuesLieWithinTheRoundingOfFp64) {
  if (!is_available()) return;
  // One block and less, edges in each dimension, many chunks, tasks by rows and by columns, spans of a deep one.
  for (const auto& [m, n, k] : {std::array<std::int64_t, 3>{1, 1, 1},
                                {32, 32, 32},
                                {7, 33, 65},
                                {70, 5, 400},
                                {33, 1030, 385},
                                {20, 2100, 40},
                                {300, 1100, 1100},
                                {9, 40, 20'011},
                                {1100, 70, 1030},
                                {5, 6, 0},
                                {0, 4, 8}})
    for (const bool left_rows : {true, false})
      for (const bool right_rows : {true, false}) {
        const at::Tensor left = laid_out(random_tensor(1, {m, k}), left_rows),
                         right = laid_out(random_tensor(2, {k, n}), right_rows), bias = random_tensor(3, {n});
        const std::string what = fmt::format("[{}, {}, {}] {} {}", m, n, k, left_rows, right_rows);
        const at::Tensor product = at::mm(exact(left), exact(right)), bound = slack(left, right);
        expect_within(fp32_gemm(left, right, 0), product, bound, what);
        expect_within(fp32_gemm(left, right, 0, bias), product + exact(bias), bound + kUnit * magnitude(bias),
                      what + " bias");
        const at::Tensor before = random_tensor(4, {m, n});
        at::Tensor into = before.clone();
        fp32_gemm_add(left, right, into);
        expect_within(into, product + exact(before), bound, what + " added");
      }
}

TEST(Fp32Gemm, NeitherThreadsNorPartsNorOtherRowsChangeABit) {
  if (!is_available()) return;
  for (const std::int64_t k : {90, 1100, 17'000}) {
    for (const std::int64_t size : {150, 20}) {
      const at::Tensor left = random_tensor(1, {size, k}), right = random_tensor(2, {k, size});
      expect_same_bits_for_any_thread_count([&] { return std::vector<at::Tensor>{fp32_gemm(left, right, 0)}; },
                                            "threads");
    }
    const at::Tensor left = random_tensor(1, {150, k}), right = random_tensor(2, {k, 140}),
                     whole = fp32_gemm(left, right, 0);
    for (const bool right_rows : {true, false}) {
      const auto part = [&](std::int64_t dim, std::int64_t first, std::int64_t size) {
        return laid_out(right.narrow(dim, first, size).contiguous(), right_rows);
      };
      for (const bool left_rows : {true, false})
        expect_same_bits(fp32_gemm(laid_out(left, left_rows), laid_out(right, right_rows), 0), whole, "layouts");
      expect_same_bits(fp32_gemm(left, {part(1, 0, 64), part(1, 64, 32), part(1, 96, 44)}, 1), whole,
                       "columns in parts");
      expect_same_bits(fp32_gemm(left, {part(0, 0, 32), part(0, 32, k - 32)}, 0), whole, "rows in parts");
    }
    expect_same_bits(fp32_gemm(left.narrow(0, 3, 9), right, 0), whole.narrow(0, 3, 9), "some rows");
    expect_same_bits(fp32_gemm(left, right.narrow(1, 31, 33), 0), whole.narrow(1, 31, 33), "some columns");
  }
}

TEST(Fp32Gemm, NotANumberAndInfinityStayInTheirRowsAndColumns) {
  if (!is_available()) return;
  at::Tensor left = at::ones({40, 50});
  left[7][3] = std::numeric_limits<float>::quiet_NaN();
  left[9][3] = std::numeric_limits<float>::infinity();
  const at::Tensor result = fp32_gemm(left, at::ones({50, 37}), 0);
  EXPECT_TRUE(result[7].isnan().all().item<bool>());
  EXPECT_TRUE(result[9].isinf().all().item<bool>());
  EXPECT_EQ(result.isfinite().sum().item<std::int64_t>(), 38 * 37);
}

}  // namespace
}  // namespace shardtune::testing
