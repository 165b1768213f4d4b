#pragma once
// Private to kernels/: how a bf16 product is cut into blocks, and its sides in the layout that bf16_tiles.hpp
// multiplies.
#include <algorithm>
#include <cstdint>

#include <ATen/core/Tensor.h>

#include "kernels/bf16_tiles.hpp"

namespace shardtune::bf16 {

// The bits of a bf16 tensor.
const std::uint16_t* numbers(const at::Tensor& x);

// What the tasks of a product share out: rows of the result, or columns of it, in multiples of 32.
enum class BlockTasks { rows, columns };

// How a product is cut. Only `chunk`, the terms added in one go, bears on the bits, and it depends on K alone. The side
// that all tasks read is packed once for all; each task packs its part of the other where it needs it.
struct Blocking {
  std::int64_t m, n, k, chunk, rows, columns;  // rows x columns: a block of the result, at most
  BlockTasks tasks = BlockTasks::rows;
  bool packs_all_depth = true;  // of a task's own side; else chunk by chunk, for every block of the result anew

  Blocking(const at::Tensor& left, std::int64_t columns_of_right);
  std::int64_t num_chunks() const { return (padded(k) + chunk - 1) / chunk; }
  std::int64_t depth(std::int64_t first) const { return std::min(chunk, padded(k) - first); }
  std::int64_t columns_at(std::int64_t column) const { return std::min(columns, padded(n) - column); }
  std::int64_t rows_at(std::int64_t row) const { return std::min(rows, padded(m) - row); }
};

// Rows or columns of a result; multiples of 32.
struct Range {
  std::int64_t first, size;
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

  struct Place {
    const std::uint16_t* data;
    std::int64_t stride;  // of the dimension that is not dense
  };
  Place at(std::int64_t k, std::int64_t n) const;

 private:
  at::TensorList parts_;
  std::int64_t dim_, begin_ = 0;
};

// Memory for a packed side, bf16 numbers.
class PackedSide {
 public:
  explicit PackedSide(std::int64_t count);
  std::uint16_t* numbers() { return reinterpret_cast<std::uint16_t*>(memory_.mutable_data_ptr<std::int16_t>()); }
  std::uint32_t* words() { return reinterpret_cast<std::uint32_t*>(numbers()); }

 private:
  at::Tensor memory_;
};

// One chunk of some columns of `right`: for each 32 columns a panel, pairs [depth / 2, 32].
void pack_right(const RightSide& right, const Blocking& b, Range columns, std::int64_t first, std::uint32_t* into);
// One chunk of some rows of `left`: for each 32 rows, blocks of 32 x 32 one after the other along K, so that a product
// reads memory from front to back.
void pack_left(const at::Tensor& left, const Blocking& b, Range rows, std::int64_t first, std::uint16_t* into);

}  // namespace shardtune::bf16
