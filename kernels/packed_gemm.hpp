#pragma once
// Private to kernels/: matrix products of any size out of blocks of 32 x 32 fp32 sums, cut and packed as in BLIS (Van
// Zee, van de Geijn, 2015). The terms of an element are added in an order that depends on K alone, so its bits depend
// neither on the number of threads nor on what other rows and columns there are.
//
// A Unit multiplies blocks. Its members, all static:
//   Number            of both sides, packed or not; kDtype, the same for tensors
//   Session           around the products of a thread
//   limits()          see Limits
//   pack_left(left, b, rows, first, into)       one chunk of some rows: for each 32 of them blocks of 32 x 32, one
//       after the other along K, so that a product reads memory from front to back
//   pack_right(right, b, columns, first, into)  one chunk of some columns: for each 32 of them a panel [depth, 32]
//   multiply(left, panel, c, rows, depth, adds) c [32, 32] = or += 32 rows by a panel; rows of c from `rows` on may
//       hold anything
#include <algorithm>
#include <cstdint>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>

#include "kernels/gemm_blocking.hpp"

namespace shardtune::packed {

// run(visit_blocks) on each thread that has a share of `size`; visit_blocks(visit) calls visit(rows or columns) for its
// blocks of about the same size, at most `block`. The same blocks each time.
template <class Unit, class Run>
void share_out(std::int64_t size, std::int64_t block, const Run& run) {
  at::parallel_for(0, padded(size) / kBlock, 1, [&](std::int64_t begin, std::int64_t end) {
    if (begin == end) return;
    [[maybe_unused]] const typename Unit::Session session;
    run([&](const auto& visit) {
      const std::int64_t share = (end - begin) * kBlock, num_blocks = (share + block - 1) / block,
                         step = padded((share + num_blocks - 1) / num_blocks);
      for (std::int64_t at = 0; at < share; at += step) visit(Range{begin * kBlock + at, std::min(step, share - at)});
    });
  });
}

// One product. finish(row, column, sums) is called once for each 32 x 32 of the result, on any thread; sums in rows
// of 32.
template <class Unit, class Finish>
class PackedProduct {
 public:
  PackedProduct(const at::Tensor& left, const RightSide& right, const Finish& finish)
      : left_(left), right_(right), finish_(finish), b_(left.size(0), right.columns(), left.size(1), Unit::limits()) {}

  void run() {
    const std::int64_t block_sums = b_.own.block * b_.shared.block;
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
            const Range beside = b_.shared.range_at(other);
            float* const c = b_.has_one_span()
                                 ? sums.numbers()
                                 : all_sums.numbers() + range.first * padded(b_.shared.size) + other * range.size;
            add_block({range, beside, c}, terms, own.numbers(), shared.numbers(), other == 0);
          }
        });
      });
    }
  }

 private:
  using Number = typename Unit::Number;
  struct Terms {
    std::int64_t begin, end;
  };
  // Of the result; sums in blocks of 32 x 32, each of its own.
  struct Block {
    Range own, shared;
    float* sums;
  };

  void pack(bool is_left, Range range, std::int64_t first, Number* into) const {
    if (is_left)
      Unit::pack_left(left_, b_, range, first, into);
    else
      Unit::pack_right(right_, b_, range, first, into);
  }

  // Where a chunk of the side that all tasks read is.
  std::int64_t place(Range range, std::int64_t first, const Terms& terms) const {
    return range.first * (terms.end - terms.begin) + (first - terms.begin) * range.size;
  }
  void pack_shared(const Terms& terms, Number* into) const {
    const std::int64_t chunks = (terms.end - terms.begin + b_.chunk - 1) / b_.chunk;
    at::parallel_for(0, b_.shared.num_blocks() * chunks, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t i = begin; i < end; ++i) {
        const Range range = b_.shared.range_at(i / chunks * b_.shared.block);
        const std::int64_t first = terms.begin + i % chunks * b_.chunk;
        pack(b_.tasks == BlockTasks::columns, range, first, into + place(range, first, terms));
      }
    });
  }

  void add_block(const Block& block, const Terms& terms, Number* own, const Number* shared, bool is_first) const {
    for (std::int64_t first = terms.begin; first < terms.end; first += b_.chunk) {
      Number* const mine = own + (b_.packs_all_depth ? first * block.own.size : 0);
      if (is_first || !b_.packs_all_depth) pack(b_.tasks == BlockTasks::rows, block.own, first, mine);
      const Number* const others = shared + place(block.shared, first, terms);
      if (b_.tasks == BlockTasks::rows)
        add_chunk(block.own, block.shared, first, mine, others, block.sums);
      else
        add_chunk(block.shared, block.own, first, others, mine, block.sums);
    }
  }

  void add_chunk(Range rows, Range columns, std::int64_t first, const Number* left, const Number* panels,
                 float* sums) const {
    const std::int64_t depth = b_.depth(first);
    const bool is_last = first + depth == padded(b_.k);
    for (std::int64_t n = 0; n < columns.size; n += kBlock)
      for (std::int64_t m = 0; m < rows.size; m += kBlock) {
        float* const c = sums + n * rows.size + m * kBlock;
        Unit::multiply(left + m * depth, panels + n * depth, c, std::min(kBlock, b_.m - rows.first - m), depth,
                       first > 0);
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
