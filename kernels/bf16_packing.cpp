#include "kernels/bf16_packing.hpp"

#include <algorithm>

#include "kernels/instruction_set.hpp"

namespace shardtune::bf16 {
namespace {

using Number = std::uint16_t;
using Word = std::uint32_t;

// A panel of the right side (32 columns) and 32 rows of the left one, one chunk of K deep, meet in the first-level
// cache on tiles; on lanes, which take longer, the panel may come from the second, and fetching and storing sums less
// often is worth more.
constexpr std::int64_t kDepthOnTiles = 256, kDepthOnLanes = 768;

// One block of 32 x 32 of a matrix as rows of 32 numbers, zeros beyond its edge: in place where it is whole.
struct Block {
  const Number* rows;
  std::int64_t stride;
};
Block block_of(const Number* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, Number* copy) {
  if (rows >= kBlock && columns >= kBlock && stride % 2 == 0) return {from, stride};
  copy_rows(from, stride, std::min(rows, kBlock), std::min(columns, kBlock), copy, kBlock);
  return {copy, kBlock};
}
const Word* words(const Number* numbers) { return reinterpret_cast<const Word*>(numbers); }

}  // namespace

packed::Limits Unit::limits() {
  return {.deepest = instruction_set() == InstructionSet::amx ? kDepthOnTiles : kDepthOnLanes,
          .own_numbers = 384 * 1024};
}

void Unit::pack_right(const packed::RightSide& right, const packed::Blocking& b, packed::Range columns,
                      std::int64_t first, Number* into) {
  const std::int64_t depth = b.depth(first);
  alignas(64) Number copy[kBlock * kBlock];
  packed::for_each_block(columns.size, depth, right.has_dense_rows(), [&](std::int64_t n, std::int64_t k) {
    const auto [data, stride] = right.at<Number>(first + k, columns.first + n);
    const std::int64_t num_terms = b.k - first - k, num_columns = b.n - columns.first - n;
    Word* const panel = reinterpret_cast<Word*>(into + n * depth + k * kBlock);
    if (right.has_dense_rows()) {
      const Block block = block_of(data, stride, num_terms, num_columns, copy);
      pair_rows(block.rows, block.stride, kBlock, kBlock, panel, kBlock);
    } else {
      const Block block = block_of(data, stride, num_columns, num_terms, copy);
      transpose_words(words(block.rows), block.stride / 2, kBlock, kBlock / 2, panel, kBlock);
    }
  });
}

void Unit::pack_left(const at::Tensor& left, const packed::Blocking& b, packed::Range rows, std::int64_t first,
                     Number* into) {
  const bool has_dense_rows = left.stride(1) == 1;
  const std::int64_t depth = b.depth(first);
  alignas(64) Number copy[kBlock * kBlock];
  alignas(64) Word pairs[kBlock / 2 * kBlock];
  packed::for_each_block(rows.size, depth, !has_dense_rows, [&](std::int64_t m, std::int64_t k) {
    const Number* const data = numbers(left) + (rows.first + m) * left.stride(0) + (first + k) * left.stride(1);
    const std::int64_t num_rows = b.m - rows.first - m, num_terms = b.k - first - k;
    Number* const packed = into + m * depth + k * kBlock;
    if (has_dense_rows) {
      copy_rows(data, left.stride(0), std::min(kBlock, num_rows), std::min(kBlock, num_terms), packed, kBlock);
    } else {
      const Block block = block_of(data, left.stride(1), num_terms, num_rows, copy);
      pair_rows(block.rows, block.stride, kBlock, kBlock, pairs, kBlock);
      transpose_words(pairs, kBlock, kBlock / 2, kBlock, reinterpret_cast<Word*>(packed), kBlock / 2);
    }
  });
}

void Unit::multiply(const packed::BlockTerms<Number>& terms) {
  bf16::multiply({.a = terms.left,
                  .lda = kBlock,
                  .b = words(terms.panel),
                  .ldb = kBlock,
                  .c = terms.c,
                  .ldc = kBlock,
                  .m = terms.rows,
                  .n = kBlock,
                  .k = terms.depth,
                  .adds = terms.adds,
                  .a_step = kBlock * kBlock});
}

}  // namespace shardtune::bf16
