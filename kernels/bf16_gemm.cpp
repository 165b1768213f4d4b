#include "kernels/bf16_gemm.hpp"

#include <algorithm>
#include <cstdint>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/error.hpp"
#include "kernels/bf16_packing.hpp"
#include "kernels/bf16_tiles.hpp"
#include "kernels/instruction_set.hpp"
#include "kernels/packed_gemm.hpp"

namespace shardtune {
namespace {

using bf16::kBlock;
using bf16::numbers;
using bf16::padded;
using packed::RightSide;
using Number = std::uint16_t;

// A result too large for the caches to keep is written past them (1.26 times as fast a product where it has 25 MB), and
// one that nobody reads for long.
template <class T>
class Destination {
 public:
  explicit Destination(const at::Tensor& out, std::int64_t streamed_bytes = kStreamed)
      : data_(static_cast<T*>(out.mutable_data_ptr())),
        stride_(out.stride(0)),
        whole_columns_(out.size(1) / kBlock * kBlock),
        streams_(static_cast<std::int64_t>(out.nbytes()) >= streamed_bytes && stride_ % kBlock == 0 &&
                 reinterpret_cast<std::uintptr_t>(data_) % 64 == 0) {}
  bf16::TargetOf<T> at(std::int64_t row, std::int64_t column) const {
    return {data_ + row * stride_ + column, stride_, streams_ && column < whole_columns_};
  }

 private:
  static constexpr std::int64_t kStreamed = 16 << 20;  // bytes
  T* data_;
  std::int64_t stride_, whole_columns_;
  bool streams_;
};

// multiply() with `bias` [N] or undefined; finish(row, column, block, its terms of the bias or null).
template <class Finish>
void multiply_with_bias(const at::Tensor& left, const RightSide& right, const at::Tensor& bias, const Finish& finish) {
  const std::int64_t m = left.size(0), n = right.columns();
  check_internal(!bias.defined() || (bias.numel() == n && bias.is_contiguous() && bias.scalar_type() == at::kBFloat16),
                 "a bf16 product takes a dense bias [N] of bf16");
  const Number* terms = bias.defined() ? numbers(bias) : nullptr;
  packed::multiply<bf16::Unit>(left, right, [&](std::int64_t row, std::int64_t column, const float* sums) {
    const bf16::Sums block{sums, kBlock, std::min(kBlock, m - row), std::min(kBlock, n - column)};
    finish(row, column, block, terms == nullptr ? nullptr : terms + column);
  });
}

void store(const bf16::Sums& block, const Number* terms, const bf16::Target& into) {
  if (terms != nullptr)
    bf16::store_with_bias(block, terms, into);
  else
    bf16::store_block(block, into);
}

void multiply_into(const at::Tensor& left, const RightSide& right, const at::Tensor& bias, const at::Tensor& out) {
  const Destination<Number> destination(out);
  multiply_with_bias(left, right, bias,
                     [&](std::int64_t row, std::int64_t column, const bf16::Sums& block, const Number* terms) {
                       store(block, terms, destination.at(row, column));
                     });
}

}  // namespace

bool takes_bf16_products(const at::Tensor& x) {
  return x.is_cpu() && x.scalar_type() == at::kBFloat16 && instruction_set() >= InstructionSet::avx512_bf16;
}

at::Tensor bf16_gemm(const at::Tensor& left, at::TensorList right_parts, std::int64_t dim, const at::Tensor& bias) {
  const RightSide right(right_parts, dim);
  at::Tensor out = at::empty({left.size(0), right.columns()}, left.options());
  multiply_into(left, right, bias, out);
  return out;
}

at::Tensor bf16_gemm_aligned(const at::Tensor& left, const at::Tensor& right) {
  const std::int64_t m = left.size(0), n = right.size(1);
  at::Tensor out = at::empty({m, padded(n)}, left.options()).narrow(1, 0, n);
  multiply_into(left, RightSide(right), {}, out);
  return out;
}

at::Tensor bf16_gemm_widened(const at::Tensor& left, const at::Tensor& right) {
  const RightSide all(right);
  at::Tensor out = at::empty({left.size(0), right.size(1)}, left.options().dtype(at::kFloat));
  const Destination<float> destination(out, 0);  // a gradient: next read when all others are there
  multiply_with_bias(left, all, {},
                     [&](std::int64_t row, std::int64_t column, const bf16::Sums& block, const Number* /*terms*/) {
                       bf16::store_rounded(block, destination.at(row, column));
                     });
  return out;
}

std::pair<at::Tensor, at::Tensor> bf16_gemm_activated(const at::Tensor& left, const at::Tensor& right,
                                                      const at::Tensor& bias, Activation activation) {
  const ActivateBlock activate_block = find_block_activation(activation);
  check_internal(activate_block != nullptr, "a product applies no other activation than gelu_tanh");
  const RightSide all(right);
  const at::Tensor product = at::empty({left.size(0), right.size(1)}, left.options()),
                   activated = at::empty_like(product);
  const Destination<Number> product_at(product), activated_at(activated);
  multiply_with_bias(
      left, all, bias, [&](std::int64_t row, std::int64_t column, const bf16::Sums& block, const Number* terms) {
        alignas(64) c10::BFloat16 x[kBlock * kBlock], y[kBlock * kBlock];
        auto* const x_bits = reinterpret_cast<Number*>(x);
        store(block, terms, {x_bits, kBlock});
        activate_block(x, y, block.rows * kBlock);
        bf16::copy_block(x_bits, block.rows, block.columns, product_at.at(row, column));
        bf16::copy_block(reinterpret_cast<Number*>(y), block.rows, block.columns, activated_at.at(row, column));
      });
  return {product, activated};
}

void bf16_gemm_add(const at::Tensor& left, const at::Tensor& right, at::Tensor& into) {
  const std::int64_t m = left.size(0), n = right.size(1);
  check_internal(into.size(0) == m && into.size(1) == n && into.stride(1) == 1,
                 "a bf16 product is added to fp32 [M, N] with dense rows");
  auto* all = into.mutable_data_ptr<float>();
  const std::int64_t into_stride = into.stride(0);
  packed::multiply<bf16::Unit>(left, RightSide(right), [&](std::int64_t row, std::int64_t column, const float* sums) {
    bf16::add_block({sums, kBlock, std::min(kBlock, m - row), std::min(kBlock, n - column)},
                    all + row * into_stride + column, into_stride);
  });
}

at::Tensor bf16_column_sums(const at::Tensor& x) {
  at::Tensor sums = at::empty({x.size(1)}, x.options());
  auto* into = reinterpret_cast<Number*>(sums.mutable_data_ptr<c10::BFloat16>());
  const std::int64_t width = x.size(1);
  at::parallel_for(0, (width + kBlock - 1) / kBlock, 8, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t c = begin * kBlock; c < std::min(width, end * kBlock); c += kBlock)
      bf16::sum_columns(numbers(x) + c, x.stride(0), x.size(0), std::min(kBlock, width - c), into + c);
  });
  return sums;
}

}  // namespace shardtune
