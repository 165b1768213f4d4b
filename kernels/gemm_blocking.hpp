#pragma once
// Private to kernels/: how a packed matrix product (packed_gemm.hpp) is cut, and its sides.
#include <algorithm>
#include <cstdint>
#include <functional>

#include <ATen/core/Tensor.h>

#include "kernels/block_size.hpp"

namespace shardtune::packed {

// The numbers of a tensor, whose dtype must be as wide.
template <class Number>
const Number* numbers(const at::Tensor& x) {
  return static_cast<const Number*>(x.const_data_ptr());
}

// Rows or columns of a result; multiples of 32.
struct Range {
  std::int64_t first, size;
};

// What the tasks of a product share out: rows of the result, or columns of it, in multiples of 32.
enum class BlockTasks { rows, columns };

// One side of a result: its rows or its columns, in blocks of the same size (multiples of 32) but for the last.
struct Side {
  std::int64_t size, block;
  Range range_at(std::int64_t first) const { return {first, std::min(block, padded(size) - first)}; }
};

// Of a Unit.
struct Limits {
  std::int64_t deepest;      // terms added in one go
  std::int64_t own_numbers;  // of a task's own side, packed, that stay in the second-level cache
};

// How a product is cut. Only `chunk`, the terms added in one go, bears on the bits, and it depends on K alone. The side
// that all tasks read is packed once for all, `span` terms at a time; each task packs its part of the other where it
// needs it.
struct Blocking {
  std::int64_t m, n, k, chunk, span;  // span: of whole chunks
  BlockTasks tasks = BlockTasks::rows;
  Side own, shared;             // own.block is the most
  bool packs_all_depth = true;  // of a task's own side; else chunk by chunk, for every block of the result anew

  Blocking(std::int64_t m, std::int64_t n, std::int64_t k, const Limits& limits);  // none of them 0
  std::int64_t depth(std::int64_t first) const { return std::min(chunk, padded(k) - first); }
  bool has_one_chunk() const { return chunk >= padded(k); }
  bool has_one_span() const { return span >= padded(k); }
};

// The right side of a product, [K, N], in parts along `dim`, all but the last of them multiples of 32 long: a block of
// 32 x 32 lies in one of them. What is given must outlive it.
class RightSide {
 public:
  RightSide(at::TensorList parts, std::int64_t dim);
  explicit RightSide(const at::Tensor& whole) : RightSide(at::TensorList(whole), 0) {}
  std::int64_t rows() const { return dim_ == 0 ? begin_ : parts_[0].size(0); }
  std::int64_t columns() const { return dim_ == 1 ? begin_ : parts_[0].size(1); }
  bool has_dense_rows() const { return parts_[0].stride(1) == 1; }
  at::ScalarType dtype() const { return parts_[0].scalar_type(); }

  template <class Number>
  struct Place {
    const Number* data;
    std::int64_t stride;  // of the dimension that is not dense
  };
  template <class Number>
  Place<Number> at(std::int64_t k, std::int64_t n) const {
    const at::Tensor& part = part_at(k, n);
    return {numbers<Number>(part) + k * part.stride(0) + n * part.stride(1),
            has_dense_rows() ? part.stride(0) : part.stride(1)};
  }

 private:
  const at::Tensor& part_at(std::int64_t& k, std::int64_t& n) const;  // makes the place one within the part
  at::TensorList parts_;
  std::int64_t dim_, begin_ = 0;
};

// Error{internal} unless it is [M, K] and [K, N] of this dtype, either dimension of each dense.
void check_product(const at::Tensor& left, const RightSide& right, at::ScalarType dtype);

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

// at::parallel_for from 0 to size: run(begin, end), never for nothing.
void in_parallel(std::int64_t size, const std::function<void(std::int64_t, std::int64_t)>& run);

at::Tensor empty_bytes(std::int64_t bytes);  // uninitialised, on a 64-byte boundary

// Memory for numbers of a packed side or for sums.
template <class Number>
class Scratch {
 public:
  explicit Scratch(std::int64_t count) : memory_(empty_bytes(count * static_cast<std::int64_t>(sizeof(Number)))) {}
  Number* numbers() { return static_cast<Number*>(memory_.mutable_data_ptr()); }

 private:
  at::Tensor memory_;
};

}  // namespace shardtune::packed
