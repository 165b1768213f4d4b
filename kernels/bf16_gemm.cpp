#include "kernels/bf16_gemm.hpp"

#include <algorithm>
#include <cstdint>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/error.hpp"
#include "kernels/bf16_packing.hpp"
#include "kernels/bf16_tiles.hpp"
#include "kernels/instruction_set.hpp"

namespace shardtune {
namespace {

using bf16::Blocking;
using bf16::BlockTasks;
using bf16::kBlock;
using bf16::numbers;
using bf16::PackedSide;
using bf16::padded;
using bf16::Range;
using bf16::RightSide;
using Number = std::uint16_t;
using Word = std::uint32_t;

// One block of the result. finish(row, column, sums) is called once for each 32 x 32 of it, sums in rows of 32.
template <class Finish>
class BlockProduct {
 public:
  BlockProduct(const Blocking& b, const Finish& finish)
      : b_(b), finish_(finish), sums_(at::empty({b.rows * b.columns})) {}

  // The chunk of K from `first` on.
  void add_chunk(Range rows, Range columns, std::int64_t first, const Number* left, const Word* panels) {
    const std::int64_t depth = b_.depth(first);
    const bool is_last = first + depth == padded(b_.k);
    auto* sums = sums_.template mutable_data_ptr<float>();
    for (std::int64_t n = 0; n < columns.size; n += kBlock)
      for (std::int64_t m = 0; m < rows.size; m += kBlock) {
        float* c = sums + n * rows.size + m * kBlock;
        bf16::multiply({.a = left + m * depth,
                        .lda = kBlock,
                        .b = panels + n * depth / 2,
                        .ldb = kBlock,
                        .c = c,
                        .ldc = kBlock,
                        .m = std::min(kBlock, b_.m - rows.first - m),
                        .n = kBlock,
                        .k = depth,
                        .adds = first > 0,
                        .a_step = kBlock * kBlock});
        if (is_last) finish_(rows.first + m, columns.first + n, c);
      }
  }

 private:
  const Blocking& b_;
  const Finish& finish_;
  at::Tensor sums_;  // blocks of 32 x 32, each of its own
};

// visit(rows or columns, first term) of all blocks and chunks of the side that all tasks read, shared out.
template <class Visit>
void for_each_chunk(const Blocking& b, std::int64_t size, std::int64_t block, const Visit& visit) {
  const std::int64_t chunks = b.num_chunks();
  at::parallel_for(0, (size + block - 1) / block * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t first = i / chunks * block;
      visit(Range{first, std::min(block, padded(size) - first)}, i % chunks * b.chunk);
    }
  });
}

// run(visit_blocks) on each thread that has a share of `size`; visit_blocks(visit) calls visit(rows or columns) for its
// blocks of about the same size, at most `block`.
template <class Run>
void share_out(std::int64_t size, std::int64_t block, const Run& run) {
  at::parallel_for(0, padded(size) / kBlock, 1, [&](std::int64_t begin, std::int64_t end) {
    if (begin == end) return;
    const bf16::TileSession session;
    run([&](const auto& visit) {
      const std::int64_t share = (end - begin) * kBlock, num_blocks = (share + block - 1) / block,
                         step = padded((share + num_blocks - 1) / num_blocks);
      for (std::int64_t at = 0; at < share; at += step) visit(Range{begin * kBlock + at, std::min(step, share - at)});
    });
  });
}

template <class Finish>
void multiply_row_blocks(const at::Tensor& left, const RightSide& right, const Blocking& b, const Finish& finish) {
  PackedSide packed(padded(b.k) * padded(b.n));
  Word* const panels = packed.words();
  const auto panels_at = [&](Range columns, std::int64_t first) {
    return panels + (columns.first * padded(b.k) + first * columns.size) / 2;
  };
  for_each_chunk(b, b.n, b.columns, [&](Range columns, std::int64_t first) {
    bf16::pack_right(right, b, columns, first, panels_at(columns, first));
  });
  share_out(b.m, b.rows, [&](const auto& visit_blocks) {
    BlockProduct product(b, finish);
    PackedSide memory(b.rows * (b.packs_all_depth ? padded(b.k) : b.chunk));
    visit_blocks([&](Range rows) {
      for (std::int64_t n = 0; n < b.n; n += b.columns)
        for (std::int64_t first = 0; first < padded(b.k); first += b.chunk) {
          const Range columns{n, b.columns_at(n)};
          Number* const chunk = memory.numbers() + (b.packs_all_depth ? first * rows.size : 0);
          if (n == 0 || !b.packs_all_depth) bf16::pack_left(left, b, rows, first, chunk);
          product.add_chunk(rows, columns, first, chunk, panels_at(columns, first));
        }
    });
  });
}

template <class Finish>
void multiply_column_blocks(const at::Tensor& left, const RightSide& right, const Blocking& b, const Finish& finish) {
  PackedSide packed(padded(b.m) * padded(b.k));
  const auto rows_at = [&](Range rows, std::int64_t first) {
    return packed.numbers() + rows.first * padded(b.k) + first * rows.size;
  };
  for_each_chunk(b, b.m, b.rows,
                 [&](Range rows, std::int64_t first) { bf16::pack_left(left, b, rows, first, rows_at(rows, first)); });
  share_out(b.n, b.columns, [&](const auto& visit_blocks) {
    BlockProduct product(b, finish);
    PackedSide memory(b.columns * (b.packs_all_depth ? padded(b.k) : b.chunk));
    visit_blocks([&](Range columns) {
      for (std::int64_t m = 0; m < b.m; m += b.rows)
        for (std::int64_t first = 0; first < padded(b.k); first += b.chunk) {
          const Range rows{m, b.rows_at(m)};
          Word* const chunk = memory.words() + (b.packs_all_depth ? first * columns.size / 2 : 0);
          if (m == 0 || !b.packs_all_depth) bf16::pack_right(right, b, columns, first, chunk);
          product.add_chunk(rows, columns, first, rows_at(rows, first), chunk);
        }
    });
  });
}

template <class Finish>
void multiply(const at::Tensor& left, const RightSide& right, const Finish& finish) {
  check_internal(left.dim() == 2 && left.size(1) == right.rows() && (left.stride(1) == 1 || left.stride(0) == 1) &&
                     left.scalar_type() == at::kBFloat16,
                 "a bf16 product takes left [M, K] with one dense dimension and right [K, N]");
  if (left.size(0) == 0 || right.columns() == 0) return;
  const Blocking b(left, right.columns());
  if (b.tasks == BlockTasks::rows)
    multiply_row_blocks(left, right, b, finish);
  else
    multiply_column_blocks(left, right, b, finish);
}

// A result too large for the caches to keep is written past them: 1.26 times as fast a product where it has 25 MB.
class Destination {
 public:
  explicit Destination(const at::Tensor& out)
      : data_(reinterpret_cast<Number*>(out.mutable_data_ptr<c10::BFloat16>())),
        stride_(out.stride(0)),
        whole_columns_(out.size(1) / kBlock * kBlock),
        streams_(static_cast<std::int64_t>(out.nbytes()) >= kStreamed && stride_ % kBlock == 0 &&
                 reinterpret_cast<std::uintptr_t>(data_) % 64 == 0) {}
  bf16::Target at(std::int64_t row, std::int64_t column) const {
    return {data_ + row * stride_ + column, stride_, streams_ && column < whole_columns_};
  }

 private:
  static constexpr std::int64_t kStreamed = 16 << 20;  // bytes
  Number* data_;
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
  multiply(left, right, [&](std::int64_t row, std::int64_t column, const float* sums) {
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
  const Destination destination(out);
  multiply_with_bias(left, right, bias,
                     [&](std::int64_t row, std::int64_t column, const bf16::Sums& block, const Number* terms) {
                       store(block, terms, destination.at(row, column));
                     });
}

}  // namespace

bool takes_bf16_products(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && instruction_set() >= InstructionSet::avx512_bf16;
}

at::Tensor bf16_gemm(const at::Tensor& left, const RightParts& parts, const at::Tensor& bias) {
  const RightSide right(parts.parts, parts.dim);
  if (left.size(1) == 0) {
    at::Tensor out = at::zeros({left.size(0), right.columns()}, left.options());
    return bias.defined() ? out.copy_(bias.expand_as(out)) : out;
  }
  at::Tensor out = at::empty({left.size(0), right.columns()}, left.options());
  multiply_into(left, right, bias, out);
  return out;
}

at::Tensor bf16_gemm_aligned(const at::Tensor& left, const at::Tensor& right) {
  const std::int64_t m = left.size(0), n = right.size(1);
  at::Tensor out = at::empty({m, padded(n)}, left.options()).narrow(1, 0, n);
  if (left.size(1) == 0) return out.zero_();
  multiply_into(left, RightSide(right), {}, out);
  return out;
}

at::Tensor bf16_gemm(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias) {
  return bf16_gemm(left, RightParts{right}, bias);
}

std::pair<at::Tensor, at::Tensor> bf16_gemm_activated(const at::Tensor& left, const at::Tensor& right,
                                                      const at::Tensor& bias, Activation activation) {
  const ActivateBlock activate_block = find_block_activation(activation);
  check_internal(activate_block != nullptr, "a product applies no other activation than gelu_tanh");
  if (left.size(1) == 0) {
    const at::Tensor product = bf16_gemm(left, right, bias);
    return {product, activate(product, activation)};
  }
  const RightSide all(right);
  const at::Tensor product = at::empty({left.size(0), right.size(1)}, left.options()),
                   activated = at::empty_like(product);
  const Destination product_at(product), activated_at(activated);
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
  if (left.size(1) == 0) return;
  const std::int64_t m = left.size(0), n = right.size(1);
  check_internal(into.size(0) == m && into.size(1) == n && into.stride(1) == 1,
                 "a bf16 product is added to fp32 [M, N] with dense rows");
  auto* all = into.mutable_data_ptr<float>();
  const std::int64_t into_stride = into.stride(0);
  multiply(left, RightSide(right), [&](std::int64_t row, std::int64_t column, const float* sums) {
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
