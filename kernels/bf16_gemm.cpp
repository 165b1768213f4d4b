#include "kernels/bf16_gemm.hpp"

#include <algorithm>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/error.hpp"
#include "kernels/bf16_tiles.hpp"
#include "kernels/instruction_set.hpp"

namespace shardtune {
namespace {

using bf16::kBlock;
using bf16::padded;
using Number = std::uint16_t;
using Word = std::uint32_t;

// A panel of `right` (32 columns) and 32 rows of `left`, one chunk of K deep, stay in the first-level cache while they
// meet; the sums of a block of the result and one side of it stay in the second, the other side comes from beyond it.
constexpr std::int64_t kDepth = 256, kNarrow = 1024, kSums = 192 * 1024, kLeftNumbers = 384 * 1024;

enum class Tasks { row_blocks, column_blocks };

// How a product is cut. Only `chunk`, the terms added in one go, bears on the bits, and it depends on K alone.
struct Blocking {
  std::int64_t m, n, k, chunk, rows, columns;  // rows x columns: a block of the result
  Tasks tasks = Tasks::row_blocks;
  bool packs_all_of_left = true;  // of a block's rows; else chunk by chunk, for every block of columns anew

  Blocking(const at::Tensor& left, std::int64_t columns_of_right)
      : m(left.size(0)), n(columns_of_right), k(left.size(1)) {
    const std::int64_t chunks = std::max<std::int64_t>(1, (k + kDepth - 1) / kDepth);
    chunk = padded((k + chunks - 1) / chunks);
    if (n >= 4 * m && padded(k) <= kNarrow) {  // a classifier's many columns: whoever needs them packs them
      tasks = Tasks::column_blocks;
      rows = columns = 256;
    } else if (padded(n) <= kNarrow) {
      columns = padded(n);
      rows = std::clamp<std::int64_t>(kSums / columns / kBlock * kBlock, 64, 512);
      packs_all_of_left = false;
    } else if (padded(k) <= kNarrow) {
      columns = 128;
      rows = std::clamp<std::int64_t>(kLeftNumbers / std::max(kBlock, padded(k)) / kBlock * kBlock, 64, 512);
    } else {
      columns = 768;
      rows = 256;
      packs_all_of_left = false;
    }
    if (tasks == Tasks::row_blocks) {  // as many blocks for every thread
      const std::int64_t threads = at::get_num_threads(),
                         blocks = (m + rows * threads - 1) / (rows * threads) * threads;
      rows = padded((m + blocks - 1) / blocks);
    }
  }
  std::int64_t depth(std::int64_t first) const { return std::min(chunk, padded(k) - first); }
  std::int64_t columns_at(std::int64_t column) const { return std::min(columns, padded(n) - column); }
  std::int64_t rows_at(std::int64_t row) const { return std::min(rows, padded(m) - row); }
};

const Number* numbers(const at::Tensor& x) {
  return reinterpret_cast<const Number*>(x.const_data_ptr<c10::BFloat16>());
}

// The right side of a product, [K, N], in parts along one dimension. A block of 32 x 32 lies in one of them.
class RightSide {
 public:
  explicit RightSide(const RightParts& given) : parts_(given.parts), dim_(given.dim) {
    for (const at::Tensor& part : parts_) {
      check_internal(
          part.dim() == 2 && (part.stride(1) == 1 || part.stride(0) == 1) && part.stride(1) == parts_[0].stride(1) &&
              part.scalar_type() == at::kBFloat16 && part.size(1 - dim_) == parts_[0].size(1 - dim_) &&
              begin_ % kBlock == 0,
          "the right side of a bf16 product is [K, N] with one dense dimension, in parts of multiples of 32");
      begin_ += part.size(dim_);
    }
  }
  std::int64_t rows() const { return dim_ == 0 ? begin_ : parts_[0].size(0); }
  std::int64_t columns() const { return dim_ == 1 ? begin_ : parts_[0].size(1); }
  bool has_dense_rows() const { return parts_[0].stride(1) == 1; }

  struct Place {
    const Number* data;
    std::int64_t stride;  // of the dimension that is not dense
  };
  Place at(std::int64_t k, std::int64_t n) const {
    std::int64_t along = dim_ == 0 ? k : n;
    std::size_t i = 0;
    while (along >= parts_[i].size(dim_)) along -= parts_[i++].size(dim_);
    const at::Tensor& part = parts_[i];
    (dim_ == 0 ? k : n) = along;
    return {numbers(part) + k * part.stride(0) + n * part.stride(1),
            has_dense_rows() ? part.stride(0) : part.stride(1)};
  }

 private:
  at::TensorList parts_;
  std::int64_t dim_, begin_ = 0;
};

// One block of 32 x 32 of a matrix as rows of 32 numbers, zeros beyond its edge: in place where it is whole.
struct Block {
  const Number* rows;
  std::int64_t stride;
};
Block block_of(const Number* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, Number* copy) {
  if (rows >= kBlock && columns >= kBlock && stride % 2 == 0) return {from, stride};
  bf16::copy_rows(from, stride, std::min(rows, kBlock), std::min(columns, kBlock), copy, kBlock);
  return {copy, kBlock};
}
const Word* words(const Number* numbers) { return reinterpret_cast<const Word*>(numbers); }

// Memory for a packed side, bf16 numbers.
class PackedSide {
 public:
  explicit PackedSide(std::int64_t count) : memory_(at::empty({count}, at::kShort)) {}
  Number* numbers() { return reinterpret_cast<Number*>(memory_.mutable_data_ptr<std::int16_t>()); }
  Word* words() { return reinterpret_cast<Word*>(numbers()); }

 private:
  at::Tensor memory_;
};

// One chunk of a block of columns of `right`: for each 32 columns a panel, pairs [depth / 2, 32].
void pack_right(const RightSide& right, const Blocking& b, std::int64_t column, std::int64_t first, Word* into) {
  const std::int64_t end = column + b.columns_at(column);
  alignas(64) Number copy[kBlock * kBlock];
  for (std::int64_t n = column; n < end; n += kBlock)
    for (std::int64_t k = first; k < first + b.depth(first); k += kBlock, into += kBlock / 2 * kBlock) {
      const auto [data, stride] = right.at(k, n);
      if (right.has_dense_rows()) {
        const Block block = block_of(data, stride, b.k - k, b.n - n, copy);
        bf16::pair_rows(block.rows, block.stride, kBlock, kBlock, into, kBlock);
      } else {
        const Block block = block_of(data, stride, b.n - n, b.k - k, copy);
        bf16::transpose_words(words(block.rows), block.stride / 2, kBlock, kBlock / 2, into, kBlock);
      }
    }
}

// One chunk of a block of rows of `left`: for each 32 rows, blocks of 32 x 32 one after the other along K, so that a
// product reads memory from front to back.
void pack_left(const at::Tensor& left, const Blocking& b, std::int64_t row, std::int64_t first, Number* into) {
  const bool has_dense_rows = left.stride(1) == 1;
  const std::int64_t end = row + b.rows_at(row);
  alignas(64) Number copy[kBlock * kBlock];
  alignas(64) Word pairs[kBlock / 2 * kBlock];
  for (std::int64_t m = row; m < end; m += kBlock)
    for (std::int64_t k = first; k < first + b.depth(first); k += kBlock, into += kBlock * kBlock) {
      const std::int64_t num_rows = b.m - m, num_terms = b.k - k;
      if (has_dense_rows) {
        bf16::copy_rows(numbers(left) + m * left.stride(0) + k, left.stride(0), std::min(kBlock, num_rows),
                        std::min(kBlock, num_terms), into, kBlock);
      } else {
        const Block block = block_of(numbers(left) + k * left.stride(1) + m, left.stride(1), num_terms, num_rows, copy);
        bf16::pair_rows(block.rows, block.stride, kBlock, kBlock, pairs, kBlock);
        bf16::transpose_words(pairs, kBlock, kBlock / 2, kBlock, reinterpret_cast<Word*>(into), kBlock / 2);
      }
    }
}

// One block of the result. finish(row, column, sums, their stride) is called once for each 32 x 32 of it.
template <class Finish>
class BlockProduct {
 public:
  BlockProduct(const Blocking& b, const Finish& finish)
      : b_(b), finish_(finish), stride_(b.columns + 16), sums_(at::empty({b.rows * stride_})) {}

  // The chunk of K from `first` on.
  void add_chunk(std::int64_t row, std::int64_t column, std::int64_t first, const Number* left, const Word* panels) {
    const std::int64_t depth = b_.depth(first), rows = b_.rows_at(row), columns = b_.columns_at(column);
    const bool is_last = first + depth == padded(b_.k);
    auto* sums = sums_.template mutable_data_ptr<float>();
    for (std::int64_t n = 0; n < columns; n += kBlock)
      for (std::int64_t m = 0; m < rows; m += kBlock) {
        float* c = sums + m * stride_ + n;
        bf16::multiply({.a = left + m * depth,
                        .lda = kBlock,
                        .b = panels + n * depth / 2,
                        .ldb = kBlock,
                        .c = c,
                        .ldc = stride_,
                        .m = kBlock,
                        .n = kBlock,
                        .k = depth,
                        .adds = first > 0,
                        .a_step = kBlock * kBlock});
        if (is_last) finish_(row + m, column + n, c, stride_);
      }
  }

 private:
  const Blocking& b_;
  const Finish& finish_;
  std::int64_t stride_;  // no multiple of 4 KiB
  at::Tensor sums_;
};

template <class Finish>
void multiply_row_blocks(const at::Tensor& left, const RightSide& right, const Blocking& b, const Finish& finish) {
  PackedSide packed(padded(b.k) * padded(b.n));
  Word* const panels = packed.words();
  const auto panels_at = [&](std::int64_t n, std::int64_t first) {
    return panels + (n * padded(b.k) + first * b.columns_at(n)) / 2;
  };
  // A narrow result is one block of columns: its chunks are shared out as well.
  const std::int64_t chunks = (padded(b.k) + b.chunk - 1) / b.chunk;
  at::parallel_for(0, (b.n + b.columns - 1) / b.columns * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t n = i / chunks * b.columns, first = i % chunks * b.chunk;
      pack_right(right, b, n, first, panels_at(n, first));
    }
  });
  at::parallel_for(0, (b.m + b.rows - 1) / b.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    if (begin == end) return;
    const bf16::TileSession session;
    BlockProduct product(b, finish);
    PackedSide memory(b.rows * (b.packs_all_of_left ? padded(b.k) : b.chunk));
    Number* const rows = memory.numbers();
    for (std::int64_t m = begin * b.rows; m < std::min(b.m, end * b.rows); m += b.rows)
      for (std::int64_t n = 0; n < b.n; n += b.columns)
        for (std::int64_t first = 0; first < padded(b.k); first += b.chunk) {
          Number* const chunk = b.packs_all_of_left ? rows + first * b.rows : rows;
          if (n == 0 || !b.packs_all_of_left) pack_left(left, b, m, first, chunk);
          product.add_chunk(m, n, first, chunk, panels_at(n, first));
        }
  });
}

template <class Finish>
void multiply_column_blocks(const at::Tensor& left, const RightSide& right, const Blocking& b, const Finish& finish) {
  PackedSide packed(padded(b.m) * padded(b.k));
  Number* const rows = packed.numbers();
  at::parallel_for(0, (b.m + b.rows - 1) / b.rows, 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t m = begin * b.rows; m < std::min(b.m, end * b.rows); m += b.rows)
      for (std::int64_t first = 0; first < padded(b.k); first += b.chunk)
        pack_left(left, b, m, first, rows + m * padded(b.k) + first * b.rows_at(m));
  });
  at::parallel_for(0, (b.n + b.columns - 1) / b.columns, 1, [&](std::int64_t begin, std::int64_t end) {
    if (begin == end) return;
    const bf16::TileSession session;
    BlockProduct product(b, finish);
    PackedSide memory(b.columns * padded(b.k));
    for (std::int64_t n = begin * b.columns; n < std::min(b.n, end * b.columns); n += b.columns) {
      const auto panels_at = [&](std::int64_t first) { return memory.words() + first * b.columns_at(n) / 2; };
      for (std::int64_t first = 0; first < padded(b.k); first += b.chunk)
        pack_right(right, b, n, first, panels_at(first));
      for (std::int64_t m = 0; m < b.m; m += b.rows)
        for (std::int64_t first = 0; first < padded(b.k); first += b.chunk)
          product.add_chunk(m, n, first, rows + m * padded(b.k) + first * b.rows_at(m), panels_at(first));
    }
  });
}

template <class Finish>
void multiply(const at::Tensor& left, const RightSide& right, const Finish& finish) {
  check_internal(left.dim() == 2 && left.size(1) == right.rows() && (left.stride(1) == 1 || left.stride(0) == 1) &&
                     left.scalar_type() == at::kBFloat16,
                 "a bf16 product takes left [M, K] with one dense dimension and right [K, N]");
  const Blocking b(left, right.columns());
  if (b.m == 0 || b.n == 0) return;
  if (b.tasks == Tasks::row_blocks)
    multiply_row_blocks(left, right, b, finish);
  else
    multiply_column_blocks(left, right, b, finish);
}

// The product with `bias` [N] or undefined; after_block(block, its place in the result, its sizes) follows each store.
template <class AfterBlock>
at::Tensor multiply_and_store(const at::Tensor& left, const RightSide& right, const at::Tensor& bias,
                              const AfterBlock& after_block) {
  const std::int64_t m = left.size(0), n = right.columns();
  check_internal(!bias.defined() || (bias.numel() == n && bias.is_contiguous() && bias.scalar_type() == at::kBFloat16),
                 "a bf16 product takes a dense bias [N] of bf16");
  at::Tensor out = at::empty({m, n}, left.options());
  auto* into = reinterpret_cast<Number*>(out.mutable_data_ptr<c10::BFloat16>());
  const Number* terms = bias.defined() ? numbers(bias) : nullptr;
  multiply(left, right, [&](std::int64_t row, std::int64_t column, const float* sums, std::int64_t stride) {
    const bf16::Sums block{sums, stride, std::min(kBlock, m - row), std::min(kBlock, n - column)};
    Number* const at = into + row * n + column;
    if (terms != nullptr)
      bf16::store_with_bias(block, terms + column, at, n);
    else
      bf16::store_block(block, at, n);
    after_block(at, row * n + column, ActivatedBlock{block.rows, block.columns, n});
  });
  return out;
}

}  // namespace

bool takes_bf16_products(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && instruction_set() >= InstructionSet::avx512_bf16;
}

at::Tensor bf16_gemm(const at::Tensor& left, const RightParts& parts, const at::Tensor& bias) {
  const RightSide right(parts);
  if (left.size(1) > 0)
    return multiply_and_store(left, right, bias, [](const Number*, std::int64_t, const ActivatedBlock&) {});
  at::Tensor out = at::zeros({left.size(0), right.columns()}, left.options());
  return bias.defined() ? out.copy_(bias.expand_as(out)) : out;
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
  at::Tensor activated = at::empty({left.size(0), right.size(1)}, left.options());
  auto* into = activated.mutable_data_ptr<c10::BFloat16>();
  const auto after_block = [&](const Number* block, std::int64_t offset, const ActivatedBlock& sizes) {
    activate_block(reinterpret_cast<const c10::BFloat16*>(block), into + offset, sizes);
  };
  return {multiply_and_store(left, RightSide({right}), bias, after_block), activated};
}

void bf16_gemm_add(const at::Tensor& left, const at::Tensor& right, at::Tensor& into) {
  if (left.size(1) == 0) return;
  const std::int64_t m = left.size(0), n = right.size(1);
  check_internal(into.size(0) == m && into.size(1) == n && into.stride(1) == 1,
                 "a bf16 product is added to fp32 [M, N] with dense rows");
  auto* all = into.mutable_data_ptr<float>();
  const std::int64_t into_stride = into.stride(0);
  multiply(left, RightSide({right}),
           [&](std::int64_t row, std::int64_t column, const float* sums, std::int64_t stride) {
             bf16::add_block({sums, stride, std::min(kBlock, m - row), std::min(kBlock, n - column)},
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
