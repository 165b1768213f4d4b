#pragma once
// Private to kernels/: products of small fp32 blocks with fused multiply-adds of AVX-512, and their layouts. Only for
// processors whose instruction_set() is avx512 or above: the source is compiled for them as a whole, so it includes
// nothing that could leave a function compiled so to the rest of the program. Packed blocks are 64-byte aligned.
#include <cstdint>

#include "kernels/block_size.hpp"

namespace shardtune::fp32 {

using packed::kBlock;

// The left side in blocks of 32 x 32 along its columns, the panel [depth, 32]. Sums of the terms are added to c as one.
void multiply(const packed::BlockTerms<float>& terms);

// [rows, columns], at most 32 x 32, any alignment -> 32 x 32, zeros where there is nothing.
void copy_block(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* into);
// The same of the transposed: into[c, r] = from[r, c].
void transpose_block(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* into);

// Rows of 32 fp32 sums -> [rows, columns] of a result, at most 32 x 32.
struct Target {
  float* data;
  std::int64_t stride, rows, columns;
};
void store_block(const float* sums, const Target& into);
void store_with_bias(const float* sums, const float* bias, const Target& into);  // bias [columns] is added to each row
void add_block(const float* sums, const Target& into);                           // into += sums

}  // namespace shardtune::fp32
