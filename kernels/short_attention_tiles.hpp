#pragma once
// Private to short_attention.cpp and compiled like it: matrix products and moves of rows that fit a core's cache, fp32.
#include <algorithm>
#include <cstdint>

#include "kernels/simd.hpp"

namespace shardtune {
namespace {

using simd::Float;
using simd::kLanes;

constexpr std::int64_t kRows = 4;  // query rows worked on together

std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A matrix read element by element: a[m * row + k * column].
struct Strided {
  const float* data;
  std::int64_t row, column;
};

template <std::int64_t kM, std::int64_t kVectors>
SHARDTUNE_INLINE void multiply_tile(const Strided& a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                                    std::int64_t k_size) {
  Float sum[kM][kVectors];
  for (std::int64_t m = 0; m < kM; ++m)
    for (std::int64_t v = 0; v < kVectors; ++v) sum[m][v] = simd::load(c + m * ldc + v * kLanes);
  for (std::int64_t k = 0; k < k_size; ++k) {
    Float row[kVectors];
    for (std::int64_t v = 0; v < kVectors; ++v) row[v] = simd::load(b + k * ldb + v * kLanes);
    for (std::int64_t m = 0; m < kM; ++m) {
      const Float factor = simd::broadcast(a.data[m * a.row + k * a.column]);
      for (std::int64_t v = 0; v < kVectors; ++v) sum[m][v] += factor * row[v];
    }
  }
  for (std::int64_t m = 0; m < kM; ++m)
    for (std::int64_t v = 0; v < kVectors; ++v) simd::store(c + m * ldc + v * kLanes, sum[m][v]);
}

template <std::int64_t kM>
SHARDTUNE_INLINE void multiply_rows(const Strided& a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                                    std::int64_t n_size, std::int64_t k_size) {
  std::int64_t n = 0;
  for (; n + 2 * kLanes <= n_size; n += 2 * kLanes) multiply_tile<kM, 2>(a, b + n, ldb, c + n, ldc, k_size);
  if (n < n_size) multiply_tile<kM, 1>(a, b + n, ldb, c + n, ldc, k_size);
}

// c[m_size, n_size] += a b. b and c have dense rows; n_size is a multiple of kLanes. Terms are added in the order of k.
SHARDTUNE_INLINE void multiply_add(Strided a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                                   std::int64_t m_size, std::int64_t n_size, std::int64_t k_size) {
  std::int64_t m = 0;
  for (; m + kRows <= m_size; m += kRows)
    multiply_rows<kRows>({a.data + m * a.row, a.row, a.column}, b, ldb, c + m * ldc, ldc, n_size, k_size);
  for (; m < m_size; ++m)
    multiply_rows<1>({a.data + m * a.row, a.row, a.column}, b, ldb, c + m * ldc, ldc, n_size, k_size);
}

template <class T>
SHARDTUNE_INLINE void load_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t size, float* into) {
  for (std::int64_t t = 0; t < rows; ++t)
    for (std::int64_t d = 0; d < size; d += kLanes)
      simd::store(into + t * padded(size) + d, simd::load_at(from + t * stride, d, size));
}

template <class T>
SHARDTUNE_INLINE void store_row(const float* from, std::int64_t size, T* into) {
  for (std::int64_t d = 0; d < size; d += kLanes) simd::store_at(into, d, size, simd::load(from + d));
}

// [rows, padded(size)] -> [size, padded(rows)]
SHARDTUNE_INLINE void transpose(const float* from, std::int64_t rows, std::int64_t size, float* into) {
  const std::int64_t wide = padded(size), high = padded(rows);
  for (std::int64_t d = 0; d < size; ++d) {
    for (std::int64_t t = 0; t < rows; ++t) into[d * high + t] = from[t * wide + d];
    std::fill(into + d * high + rows, into + (d + 1) * high, 0.0F);
  }
}

}  // namespace
}  // namespace shardtune
