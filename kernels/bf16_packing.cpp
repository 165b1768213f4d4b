#include "kernels/bf16_packing.hpp"

#include <algorithm>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/error.hpp"
#include "kernels/instruction_set.hpp"

namespace shardtune::bf16 {
namespace {

using Number = std::uint16_t;
using Word = std::uint32_t;

// A panel of `right` (32 columns) and 32 rows of `left`, one chunk of K deep, meet in the first-level cache on tiles;
// on lanes, which take longer, the panel may come from the second, and fetching and storing sums less often is worth
// more. The sums of a block of the result and one side of it stay in the second, the other side comes from beyond it.
constexpr std::int64_t kDepthOnTiles = 256, kDepthOnLanes = 768, kNarrow = 1024, kSums = 192 * 1024,
                       kOwnNumbers = 384 * 1024;
constexpr double kUneven = 1.02;  // less is not worth another way

// Of the other dimension of a block whose sums stay in the cache.
std::int64_t beside(std::int64_t size) { return std::clamp<std::int64_t>(kSums / size / kBlock * kBlock, 64, 512); }
// How many times as long as all threads would take together the busiest one takes, for a dimension shared out by
// blocks.
double unevenness(std::int64_t size) {
  const std::int64_t threads = at::get_num_threads(), blocks = padded(size) / kBlock;
  return static_cast<double>((blocks + threads - 1) / threads * threads * kBlock) / static_cast<double>(size);
}

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

// visit(place along the result, place along K) for every 32 x 32 of a chunk, so that those next to each other in memory
// follow each other.
template <class Visit>
void for_each_block(std::int64_t size, std::int64_t depth, bool is_dense_along_result, const Visit& visit) {
  if (is_dense_along_result) {
    for (std::int64_t k = 0; k < depth; k += kBlock)
      for (std::int64_t i = 0; i < size; i += kBlock) visit(i, k);
  } else {
    for (std::int64_t i = 0; i < size; i += kBlock)
      for (std::int64_t k = 0; k < depth; k += kBlock) visit(i, k);
  }
}

}  // namespace

const Number* numbers(const at::Tensor& x) {
  return reinterpret_cast<const Number*>(x.const_data_ptr<c10::BFloat16>());
}

Blocking::Blocking(const at::Tensor& left, std::int64_t columns_of_right)
    : m(left.size(0)), n(columns_of_right), k(left.size(1)) {
  const std::int64_t deepest = instruction_set() == InstructionSet::amx ? kDepthOnTiles : kDepthOnLanes;
  const std::int64_t chunks = std::max<std::int64_t>(1, (k + deepest - 1) / deepest);
  chunk = padded((k + chunks - 1) / chunks);
  const bool is_shallow = padded(k) <= kNarrow;
  const bool is_wide =
      is_shallow ? n >= 4 * m : padded(n) > kNarrow && padded(m) <= kNarrow;  // a classifier; a weight's gradient
  if (is_wide || unevenness(m) > kUneven * unevenness(n)) tasks = BlockTasks::columns;
  std::int64_t& own = tasks == BlockTasks::rows ? rows : columns;
  std::int64_t& shared = tasks == BlockTasks::rows ? columns : rows;
  const std::int64_t shared_size = padded(tasks == BlockTasks::rows ? n : m);
  if (is_wide && is_shallow) {
    own = shared = 256;
  } else if (shared_size <= kNarrow) {
    shared = shared_size;
    own = beside(shared);
    packs_all_depth = false;
  } else if (is_shallow) {
    shared = 128;
    own = std::clamp<std::int64_t>(kOwnNumbers / std::max(kBlock, padded(k)) / kBlock * kBlock, 64, 512);
  } else {
    shared = 768;
    own = 256;
    packs_all_depth = false;
  }
}

RightSide::RightSide(at::TensorList parts, std::int64_t dim) : parts_(parts), dim_(dim) {
  for (const at::Tensor& part : parts_) {
    check_internal(part.dim() == 2 && (part.stride(1) == 1 || part.stride(0) == 1) &&
                       part.stride(1) == parts_[0].stride(1) && part.scalar_type() == at::kBFloat16 &&
                       part.size(1 - dim_) == parts_[0].size(1 - dim_) && begin_ % kBlock == 0,
                   "the right side of a bf16 product is [K, N] with one dense dimension, in parts of multiples of 32");
    begin_ += part.size(dim_);
  }
}

RightSide::Place RightSide::at(std::int64_t k, std::int64_t n) const {
  std::int64_t along = dim_ == 0 ? k : n;
  std::size_t i = 0;
  while (along >= parts_[i].size(dim_)) along -= parts_[i++].size(dim_);
  const at::Tensor& part = parts_[i];
  (dim_ == 0 ? k : n) = along;
  return {numbers(part) + k * part.stride(0) + n * part.stride(1), has_dense_rows() ? part.stride(0) : part.stride(1)};
}

PackedSide::PackedSide(std::int64_t count) : memory_(at::empty({count}, at::kShort)) {}

void pack_right(const RightSide& right, const Blocking& b, Range columns, std::int64_t first, Word* into) {
  const std::int64_t depth = b.depth(first);
  alignas(64) Number copy[kBlock * kBlock];
  for_each_block(columns.size, depth, right.has_dense_rows(), [&](std::int64_t n, std::int64_t k) {
    const auto [data, stride] = right.at(first + k, columns.first + n);
    const std::int64_t num_terms = b.k - first - k, num_columns = b.n - columns.first - n;
    Word* const panel = into + (n * depth + k * kBlock) / 2;
    if (right.has_dense_rows()) {
      const Block block = block_of(data, stride, num_terms, num_columns, copy);
      pair_rows(block.rows, block.stride, kBlock, kBlock, panel, kBlock);
    } else {
      const Block block = block_of(data, stride, num_columns, num_terms, copy);
      transpose_words(words(block.rows), block.stride / 2, kBlock, kBlock / 2, panel, kBlock);
    }
  });
}

void pack_left(const at::Tensor& left, const Blocking& b, Range rows, std::int64_t first, Number* into) {
  const bool has_dense_rows = left.stride(1) == 1;
  const std::int64_t depth = b.depth(first);
  alignas(64) Number copy[kBlock * kBlock];
  alignas(64) Word pairs[kBlock / 2 * kBlock];
  for_each_block(rows.size, depth, !has_dense_rows, [&](std::int64_t m, std::int64_t k) {
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

}  // namespace shardtune::bf16
