#pragma once
// Private to kernels/: matrix products of any size out of blocks of 32 x 32 fp32 sums, cut and packed as in BLIS (Van
// Zee, van de Geijn, 2015). The terms of an element are added in an order that depends on K alone, so its bits depend
// neither on the number of threads nor on what other rows and columns there are.
//
// A Unit multiplies blocks. Its members, all static:
//   Number, kDtype    of both sides, packed or not
//   Session, limits() around the products of a thread; see Limits
//   pack_left(left, b, rows, first, into)       one chunk of some rows: for each 32 of them blocks of 32 x 32 along K
//   pack_right(right, b, columns, first, into)  one chunk of some columns: for each 32 of them a panel [depth, 32]
//   multiply(BlockTerms<Number>)
#include <algorithm>
#include <cstdint>
#include <utility>

#include <ATen/core/Tensor.h>

#include "kernels/gemm_blocking.hpp"

namespace shardtune::packed {

// run(visit_blocks) on each thread that has a share of `size`; visit_blocks(visit) calls visit(rows or columns) for its
// blocks of about the same size, at most `block`.
template <class Unit, class Run>
void share_out(std::int64_t size, std::int64_t block, const Run& run) {
  in_parallel(padded(size) / kBlock, [&](std::int64_t begin, std::int64_t end) {
    [[maybe_unused]] const typename Unit::Session session;
    run([&](const auto& visit) {
      const std::int64_t share = (end - begin) * kBlock, num_blocks = (share + block - 1) / block,
                         step = padded((share + num_blocks - 1) / num_blocks);
      for (std::int64_t at = 0; at < share; at += step) visit(Range{begin * kBlock + at, std::min(step, share - at)});
    });
  });
}

// finish(row, column, sums in rows of 32) is called once for each 32 x 32 of the product, on any thread.
template <class Unit, class Finish>
class PackedProduct {
 public:
  PackedProduct(const at::Tensor& left, const RightSide& right, const Finish& finish)
      : left_(left), right_(right), finish_(finish), b_(left.size(0), right.columns(), left.size(1), Unit::limits()) {}

  void run() {
    const std::int64_t block_sums = b_.has_one_chunk() ? kBlock * kBlock : b_.own.block * b_.shared.block;
    Scratch<Number> shared(padded(b_.shared.size) * b_.span);
    Scratch<float> all_sums(b_.has_one_span() ? 0 : padded(b_.m) * padded(b_.n));
    for (std::int64_t from = 0; from < padded(b_.k); from += b_.span) {
      const Terms terms{from, std::min(from + b_.span, padded(b_.k))};
      pack_shared(terms, shared.numbers());
      share_out<Unit>(b_.own.size, b_.own.block, [&](const auto& visit_blocks) {
        Scratch<float> sums(b_.has_one_span() ? block_sums : 0);
        Scratch<Number> own(b_.own.block * (b_.packs_all_depth ? padded(b_.k) : b_.chunk));
        visit_blocks([&](Range range) {
          for (std::int64_t other = 0; other < b_.shared.size; other += b_.shared.block) {
            float* const all = b_.has_one_span() ? nullptr : all_sums.numbers();
            const Block block = block_of(range, b_.shared.range_at(other), sums.numbers(), all);
            add_terms(block, terms, own.numbers(), shared.numbers());
          }
        });
      });
    }
  }

 private:
  using Number = typename Unit::Number;
  struct Terms {
    std::int64_t begin, end;
    std::int64_t size() const { return end - begin; }
  };
  // Of the result; sums in blocks of 32 x 32, so many numbers further for each row and each column.
  struct Block {
    Range rows, columns;
    float* sums;
    std::int64_t row_step, column_step;
  };

  // Sums of all spans lie where the block is in the result, those of one chunk, finished at once, in one place.
  Block block_of(Range own, Range shared, float* sums, float* all_sums) const {
    const auto [rows, columns] = b_.tasks == BlockTasks::rows ? std::pair(own, shared) : std::pair(shared, own);
    if (b_.has_one_chunk()) return {rows, columns, sums, 0, 0};
    if (b_.has_one_span()) return {rows, columns, sums, kBlock, rows.size};
    return {rows, columns, all_sums + columns.first * padded(b_.m) + rows.first * kBlock, kBlock, padded(b_.m)};
  }

  void pack(bool is_left, Range range, std::int64_t first, Number* into) const {
    is_left ? Unit::pack_left(left_, b_, range, first, into) : Unit::pack_right(right_, b_, range, first, into);
  }

  // Where a chunk of the side that all tasks read is.
  std::int64_t place(Range range, std::int64_t first, const Terms& terms) const {
    return range.first * terms.size() + (first - terms.begin) * range.size;
  }
  // Shared out in panels of 32, those next to each other packed in one go.
  void pack_shared(const Terms& terms, Number* into) const {
    const std::int64_t chunks = (terms.size() + b_.chunk - 1) / b_.chunk, panels = padded(b_.shared.size) / kBlock;
    in_parallel(panels * chunks, [&](std::int64_t begin, std::int64_t end) {
      while (begin < end) {
        const std::int64_t first = terms.begin + begin / panels * b_.chunk, at = begin % panels * kBlock;
        const Range block = b_.shared.range_at(at / b_.shared.block * b_.shared.block);
        const Range range{at, std::min(block.first + block.size - at, (end - begin) * kBlock)};
        pack(b_.tasks == BlockTasks::columns, range, first,
             into + place(block, first, terms) + (at - block.first) * b_.depth(first));
        begin += range.size / kBlock;
      }
    });
  }

  void add_terms(const Block& block, const Terms& terms, Number* own, const Number* shared) const {
    const bool by_rows = b_.tasks == BlockTasks::rows;
    const Range mine = by_rows ? block.rows : block.columns, others = by_rows ? block.columns : block.rows;
    for (std::int64_t first = terms.begin; first < terms.end; first += b_.chunk) {
      Number* const packed = own + (b_.packs_all_depth ? first * mine.size : 0);
      if (others.first == 0 || !b_.packs_all_depth) pack(by_rows, mine, first, packed);
      const Number* const beside = shared + place(others, first, terms);
      add_chunk(block, first, by_rows ? packed : beside, by_rows ? beside : packed);
    }
  }

  void add_chunk(const Block& block, std::int64_t first, const Number* left, const Number* panels) const {
    const auto [rows, columns, sums, row_step, column_step] = block;
    const std::int64_t depth = b_.depth(first);
    const bool is_last = first + depth == padded(b_.k);
    for (std::int64_t n = 0; n < columns.size; n += kBlock)
      for (std::int64_t m = 0; m < rows.size; m += kBlock) {
        float* const c = sums + n * column_step + m * row_step;
        const std::int64_t num_rows = std::min(kBlock, b_.m - rows.first - m);
        Unit::multiply(BlockTerms<Number>{left + m * depth, panels + n * depth, c, num_rows, depth, first > 0});
        if (is_last) finish_(rows.first + m, columns.first + n, c);
      }
  }

  const at::Tensor& left_;
  const RightSide& right_;
  const Finish& finish_;
  const Blocking b_;
};

// left [M, K] right [K, N], either dimension of each dense, any sizes.
template <class Unit, class Finish>
void multiply(const at::Tensor& left, const RightSide& right, const Finish& finish) {
  check_product(left, right, Unit::kDtype);
  if (left.size(0) == 0 || right.columns() == 0) return;
  if (left.size(1) > 0) return PackedProduct<Unit, Finish>(left, right, finish).run();
  [[maybe_unused]] const typename Unit::Session session;
  alignas(64) const float zeros[kBlock * kBlock] = {};
  for (std::int64_t m = 0; m < left.size(0); m += kBlock)
    for (std::int64_t n = 0; n < right.columns(); n += kBlock) finish(m, n, zeros);
}

}  // namespace shardtune::packed
