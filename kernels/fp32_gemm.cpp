#include "kernels/fp32_gemm.hpp"

#include <algorithm>
#include <cstdint>

#include <ATen/ATen.h>

#include "core/error.hpp"
#include "kernels/fp32_lanes.hpp"
#include "kernels/instruction_set.hpp"
#include "kernels/packed_gemm.hpp"

namespace shardtune {
namespace {

using packed::Blocking;
using packed::kBlock;
using packed::Range;
using packed::RightSide;

// A Unit of packed_gemm.hpp.
struct Unit {
  using Number = float;
  struct Session {};
  static constexpr at::ScalarType kDtype = at::kFloat;

  static packed::Limits limits() { return {.deepest = 384, .own_numbers = 192 * 1024}; }

  static void pack_left(const at::Tensor& left, const Blocking& b, Range rows, std::int64_t first, float* into) {
    const bool has_dense_rows = left.stride(1) == 1;
    const std::int64_t depth = b.depth(first);
    packed::for_each_block(rows.size, depth, !has_dense_rows, [&](std::int64_t m, std::int64_t k) {
      const float* const data =
          packed::numbers<float>(left) + (rows.first + m) * left.stride(0) + (first + k) * left.stride(1);
      const std::int64_t num_rows = std::min(kBlock, b.m - rows.first - m),
                         num_terms = std::min(kBlock, b.k - first - k);
      float* const block = into + m * depth + k * kBlock;
      if (has_dense_rows)
        fp32::copy_block(data, left.stride(0), num_rows, num_terms, block);
      else
        fp32::transpose_block(data, left.stride(1), num_terms, num_rows, block);
    });
  }

  static void pack_right(const RightSide& right, const Blocking& b, Range columns, std::int64_t first, float* into) {
    const std::int64_t depth = b.depth(first);
    packed::for_each_block(columns.size, depth, right.has_dense_rows(), [&](std::int64_t n, std::int64_t k) {
      const auto [data, stride] = right.at<float>(first + k, columns.first + n);
      const std::int64_t num_terms = std::min(kBlock, b.k - first - k),
                         num_columns = std::min(kBlock, b.n - columns.first - n);
      float* const block = into + n * depth + k * kBlock;
      if (right.has_dense_rows())
        fp32::copy_block(data, stride, num_terms, num_columns, block);
      else
        fp32::transpose_block(data, stride, num_columns, num_terms, block);
    });
  }

  static void multiply(const packed::BlockTerms<float>& terms) { fp32::multiply(terms); }
};

// A block of `out` [M, N], which has dense rows.
fp32::Target target(const at::Tensor& out, float* data, std::int64_t row, std::int64_t column) {
  return {data + row * out.stride(0) + column, out.stride(0), std::min(kBlock, out.size(0) - row),
          std::min(kBlock, out.size(1) - column)};
}

}  // namespace

bool prefers_fp32_products() {
  static const bool is_faster = best_instruction_set() >= InstructionSet::avx512 && !is_intel_processor();
  return is_faster;
}

at::Tensor fp32_gemm(const at::Tensor& left, at::TensorList right_parts, std::int64_t dim, const at::Tensor& bias) {
  const RightSide right(right_parts, dim);
  const at::Tensor out = at::empty({left.size(0), right.columns()}, left.options());
  check_internal(
      !bias.defined() || (bias.numel() == out.size(1) && bias.is_contiguous() && bias.scalar_type() == at::kFloat),
      "an fp32 product takes a dense bias [N] of fp32");
  auto* const data = out.mutable_data_ptr<float>();
  const float* terms = bias.defined() ? bias.const_data_ptr<float>() : nullptr;
  packed::multiply<Unit>(left, right, [&](std::int64_t row, std::int64_t column, const float* sums) {
    const fp32::Target into = target(out, data, row, column);
    if (terms == nullptr)
      fp32::store_block(sums, into);
    else
      fp32::store_with_bias(sums, terms + column, into);
  });
  return out;
}

void fp32_gemm_add(const at::Tensor& left, const at::Tensor& right, at::Tensor& into) {
  check_internal(into.size(0) == left.size(0) && into.size(1) == right.size(1) && into.stride(1) == 1 &&
                     into.scalar_type() == at::kFloat,
                 "an fp32 product is added to fp32 [M, N] with dense rows");
  auto* const data = into.mutable_data_ptr<float>();
  packed::multiply<Unit>(left, RightSide(right), [&](std::int64_t row, std::int64_t column, const float* sums) {
    fp32::add_block(sums, target(into, data, row, column));
  });
}

}  // namespace shardtune
