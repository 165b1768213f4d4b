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

// A panel of `right`, 32 columns and one chunk of K, stays in the first-level cache while it meets all rows of a task;
// those rows of `left`, and their sums for kColumns columns, stay in the second.
constexpr std::int64_t kDepth = 512, kColumns = 512, kTaskNumbers = 512 * 1024;
constexpr std::int64_t kSumStride = kColumns + 16;  // no multiple of 4 KiB

struct Sizes {
  std::int64_t m, n, k, chunk;  // chunk: terms added in one go
  Sizes(const at::Tensor& left, const at::Tensor& right) : m(left.size(0)), n(right.size(1)), k(left.size(1)) {
    const std::int64_t chunks = std::max<std::int64_t>(1, (k + kDepth - 1) / kDepth);
    chunk = padded((k + chunks - 1) / chunks);
  }
  std::int64_t depth(std::int64_t first) const { return std::min(chunk, padded(k) - first); }
  std::int64_t rows_of_task() const {
    const std::int64_t fitting = std::clamp<std::int64_t>(kTaskNumbers / std::max<std::int64_t>(1, padded(k)), 64, 256);
    const std::int64_t even = padded((m + 4 * at::get_num_threads() - 1) / (4 * at::get_num_threads()));
    return std::min(fitting / kBlock * kBlock, even);
  }
};

const Number* numbers(const at::Tensor& x) {
  return reinterpret_cast<const Number*>(x.const_data_ptr<c10::BFloat16>());
}

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

// right -> for each chunk of K, for each 32 columns: pairs [depth / 2, 32].
at::Tensor pack_right(const at::Tensor& right, const Sizes& s) {
  const std::int64_t width = padded(s.n);
  at::Tensor packed = at::empty({padded(s.k) / 2 * width}, at::kInt);
  auto* all = reinterpret_cast<Word*>(packed.mutable_data_ptr<std::int32_t>());
  const bool has_dense_rows = right.stride(1) == 1;
  at::parallel_for(0, width / kBlock, 1, [&](std::int64_t first, std::int64_t last) {
    alignas(64) Number copy[kBlock * kBlock];
    for (std::int64_t n = first * kBlock; n < last * kBlock; n += kBlock)
      for (std::int64_t k = 0; k < s.k; k += kBlock) {
        const std::int64_t chunk = k / s.chunk * s.chunk;
        Word* into = all + chunk / 2 * width + (n * s.depth(chunk) + (k - chunk) * kBlock) / 2;
        if (has_dense_rows) {
          const Block block =
              block_of(numbers(right) + k * right.stride(0) + n, right.stride(0), s.k - k, s.n - n, copy);
          bf16::pair_rows(block.rows, block.stride, kBlock, kBlock, into, kBlock);
        } else {
          const Block block =
              block_of(numbers(right) + n * right.stride(1) + k, right.stride(1), s.n - n, s.k - k, copy);
          bf16::transpose_words(words(block.rows), block.stride / 2, kBlock, kBlock / 2, into, kBlock);
        }
      }
  });
  return packed;
}

// The rows of a task: for each chunk of K, for each 32 rows, blocks of 32 x 32 one after the other along K, so that a
// product reads memory from front to back.
std::int64_t left_offset(const Sizes& s, std::int64_t first, std::int64_t row, std::int64_t rows) {
  return first * rows + row * s.depth(first);
}

void pack_left(const at::Tensor& left, const Sizes& s, std::int64_t m, std::int64_t rows, Number* packed) {
  const bool has_dense_rows = left.stride(1) == 1;
  alignas(64) Number copy[kBlock * kBlock];
  alignas(64) Word pairs[kBlock / 2 * kBlock];
  for (std::int64_t row = 0; row < std::min(rows, s.m - m); row += kBlock)
    for (std::int64_t k = 0; k < s.k; k += kBlock) {
      const std::int64_t first = k / s.chunk * s.chunk, num_rows = s.m - m - row, num_terms = s.k - k;
      Number* into = packed + left_offset(s, first, row, rows) + (k - first) * kBlock;
      if (has_dense_rows) {
        bf16::copy_rows(numbers(left) + (m + row) * left.stride(0) + k, left.stride(0), std::min(kBlock, num_rows),
                        std::min(kBlock, num_terms), into, kBlock);
      } else {
        const Block block =
            block_of(numbers(left) + k * left.stride(1) + m + row, left.stride(1), num_terms, num_rows, copy);
        bf16::pair_rows(block.rows, block.stride, kBlock, kBlock, pairs, kBlock);
        bf16::transpose_words(pairs, kBlock, kBlock / 2, kBlock, reinterpret_cast<Word*>(into), kBlock / 2);
      }
    }
}

// finish(first row of the block of 32 x 32, first column, sums, their stride) is called once for each block of the
// result.
template <class Finish>
void multiply(const at::Tensor& left, const at::Tensor& right, const Finish& finish) {
  const Sizes s(left, right);
  if (s.m == 0 || s.n == 0) return;
  const at::Tensor packed = pack_right(right, s);
  const Word* panels = reinterpret_cast<const Word*>(packed.const_data_ptr<std::int32_t>());
  const std::int64_t width = padded(s.n), rows = s.rows_of_task();
  at::parallel_for(0, (s.m + rows - 1) / rows, 1, [&](std::int64_t begin, std::int64_t end) {
    if (begin == end) return;
    const bf16::TileSession session;
    at::Tensor left_memory = at::empty({rows * padded(s.k)}, at::kShort), sum_memory = at::empty({rows * kSumStride});
    auto* a = reinterpret_cast<Number*>(left_memory.mutable_data_ptr<std::int16_t>());
    auto* sums = sum_memory.mutable_data_ptr<float>();
    for (std::int64_t m = begin * rows; m < std::min(s.m, end * rows); m += rows) {
      pack_left(left, s, m, rows, a);
      const std::int64_t used = std::min(rows, padded(s.m - m));
      for (std::int64_t block = 0; block < width; block += kColumns)
        for (std::int64_t first = 0; first < padded(s.k); first += s.chunk) {
          const std::int64_t depth = s.depth(first);
          const bool is_last = first + depth == padded(s.k);
          for (std::int64_t n = block; n < std::min(width, block + kColumns); n += kBlock)
            for (std::int64_t row = 0; row < used; row += kBlock) {
              float* c = sums + row * kSumStride + n - block;
              bf16::multiply({.a = a + left_offset(s, first, row, rows),
                              .lda = kBlock,
                              .b = panels + (first * width + n * depth) / 2,
                              .ldb = kBlock,
                              .c = c,
                              .ldc = kSumStride,
                              .m = kBlock,
                              .n = kBlock,
                              .k = depth,
                              .adds = first > 0,
                              .a_step = kBlock * kBlock});
              if (is_last) finish(m + row, n, c, kSumStride);
            }
        }
    }
  });
}

void check(const at::Tensor& left, const at::Tensor& right) {
  check_internal(left.dim() == 2 && right.dim() == 2 && left.size(1) == right.size(0) &&
                     (left.stride(1) == 1 || left.stride(0) == 1) && (right.stride(1) == 1 || right.stride(0) == 1) &&
                     left.scalar_type() == at::kBFloat16 && right.scalar_type() == at::kBFloat16,
                 "a bf16 product takes left [M, K] and right [K, N] with one dense dimension each");
}

}  // namespace

bool takes_bf16_products(const at::Tensor& x) {
  return x.scalar_type() == at::kBFloat16 && instruction_set() >= InstructionSet::avx512_bf16;
}

at::Tensor bf16_gemm(const at::Tensor& left, const at::Tensor& right) {
  if (left.size(1) == 0) return at::mm(left, right);
  check(left, right);
  const std::int64_t m = left.size(0), n = right.size(1);
  at::Tensor out = at::empty({m, n}, left.options());
  auto* into = reinterpret_cast<Number*>(out.mutable_data_ptr<c10::BFloat16>());
  multiply(left, right, [&](std::int64_t row, std::int64_t column, const float* sums, std::int64_t stride) {
    bf16::store_block({sums, stride, std::min(kBlock, m - row), std::min(kBlock, n - column)}, into + row * n + column,
                      n);
  });
  return out;
}

void bf16_gemm_add(const at::Tensor& left, const at::Tensor& right, at::Tensor& into) {
  if (left.size(1) == 0) return;
  check(left, right);
  const std::int64_t m = left.size(0), n = right.size(1);
  check_internal(into.size(0) == m && into.size(1) == n && into.stride(1) == 1,
                 "a bf16 product is added to fp32 [M, N] with dense rows");
  auto* all = into.mutable_data_ptr<float>();
  const std::int64_t into_stride = into.stride(0);
  multiply(left, right, [&](std::int64_t row, std::int64_t column, const float* sums, std::int64_t stride) {
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
