#pragma once
// Private to kernels/: products of small bf16 blocks with fp32 sums, on AMX tiles or with vdpbf16ps, and the layouts
// that both take. Only for processors whose instruction_set() is avx512_bf16 or amx: the source is compiled for them as
// a whole, so it includes nothing that could leave a function compiled so to the rest of the program. Numbers are the
// bits of bf16. All pointers are 64-byte aligned unless noted. Both units flush denormal numbers to zero.
#include <cstdint>

#include "kernels/block_size.hpp"

namespace shardtune::bf16 {

using packed::kBlock;  // sizes of operands are multiples of it, unless noted
using packed::padded;

// The tiles of this thread, while it lives; on avx512_bf16 nothing. Every product needs one around it, and so do
// streaming stores, which other threads see once the session has ended.
class TileSession {
 public:
  TileSession();
  ~TileSession();
  TileSession(const TileSession&) = delete;
  TileSession& operator=(const TileSession&) = delete;
};

// c[m, n] = a[m, k] b[k, n], or += where `adds`. a: rows of k numbers, or blocks of 32 columns `a_step` apart. b: k / 2
// rows of n words, a word holds the numbers of two consecutive rows (the first in the low half). c: fp32. Strides (ld*)
// in elements of the pointer's type. m may be anything: rows of c beyond it, up to the next multiple of 32, must be
// there and hold anything afterwards.
struct Product {
  const std::uint16_t* a;
  std::int64_t lda;
  const std::uint32_t* b;
  std::int64_t ldb;
  float* c;
  std::int64_t ldc;
  std::int64_t m, n, k;
  bool adds = false;
  std::int64_t a_step = kBlock;
};
void multiply(const Product& product);

// [rows, columns] of any alignment and size -> [padded rows, padded columns], zeros where there is nothing.
void copy_rows(const std::uint16_t* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               std::uint16_t* into, std::int64_t into_stride);
// Rows of `columns` numbers -> rows / 2 rows of words as Product::b has them.
void pair_rows(const std::uint16_t* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
               std::uint32_t* into, std::int64_t into_stride);
// into[c, r] = from[r, c]; multiples of 16.
void transpose_words(const std::uint32_t* from, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                     std::uint32_t* into, std::int64_t into_stride);

// fp32 numbers of a result. Rows are read to the end of their last 16.
struct Sums {
  const float* data;
  std::int64_t stride, rows, columns;
};
// Rows of bf16 or fp32. `streams`: past the caches, so that memory is not read before it is written; rows are then
// 64-byte aligned and of whole blocks.
template <class T>
struct TargetOf {
  T* data;
  std::int64_t stride;
  bool streams = false;
};
using Target = TargetOf<std::uint16_t>;
// into = factor times sums, rounded to bf16. Any alignment.
void store_block(const Sums& sums, const Target& into, float factor = 1.0F);
// into = sums + bias[columns], rounded to bf16 once. Any alignment.
void store_with_bias(const Sums& sums, const std::uint16_t* bias, const Target& into);
// into = sums, rounded to bf16. Any alignment.
void store_rounded(const Sums& sums, const TargetOf<float>& into);
// At most 32 columns of rows of 32 numbers, one after the other.
void copy_block(const std::uint16_t* from, std::int64_t rows, std::int64_t columns, const Target& into);
void add_block(const Sums& sums, float* into, std::int64_t stride);  // into += sums
// into[c] = sum of rows of x[., c], at most 32 columns; fp32 sums of 64 rows, added in order.
void sum_columns(const std::uint16_t* x, std::int64_t stride, std::int64_t rows, std::int64_t columns,
                 std::uint16_t* into);

}  // namespace shardtune::bf16
