#include "kernels/fp32_lanes.hpp"

#include "kernels/avx512_lanes.hpp"

// Compiled for AVX-512 (see CMakeLists.txt); no templates of the standard library in here.
namespace shardtune::fp32 {
namespace {

using avx512::kLanes;
using avx512::lanes_below;
using avx512::transpose_16;

// kRows rows and 32 columns of c: 2 kRows sums, each waiting for its own last addition only.
template <int kRows>
void multiply_rows(const packed::BlockTerms<float>& terms, std::int64_t row) {
  __m512 sum[kRows][2];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) sum[r][v] = _mm512_setzero_ps();
  const float* const a = terms.left + row * kBlock;
  const float* b = terms.panel;
  for (std::int64_t k = 0; k < terms.depth; ++k, b += kBlock) {
    const float* factors = a + k / kBlock * (kBlock * kBlock) + k % kBlock;
    const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor = _mm512_set1_ps(factors[r * kBlock]);
      sum[r][0] = _mm512_fmadd_ps(factor, b0, sum[r][0]);
      sum[r][1] = _mm512_fmadd_ps(factor, b1, sum[r][1]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) {
      float* const c = terms.c + (row + r) * kBlock + v * kLanes;
      _mm512_store_ps(c, terms.adds ? _mm512_add_ps(_mm512_load_ps(c), sum[r][v]) : sum[r][v]);
    }
}

// value_of(sums, into, lanes, column): what is stored of 16 of them.
template <class ValueOf>
[[gnu::always_inline]] inline void store_rows(const float* sums, const Target& into, const ValueOf& value_of) {
  float* row = into.data;
  for (std::int64_t r = 0; r < into.rows; ++r, sums += kBlock, row += into.stride)
    for (std::int64_t c = 0; c < into.columns; c += kLanes) {
      const __mmask16 lanes = lanes_below(into.columns - c);
      _mm512_mask_storeu_ps(row + c, lanes, value_of(_mm512_load_ps(sums + c), row + c, lanes, c));
    }
}

}  // namespace

void multiply(const packed::BlockTerms<float>& terms) {
  for (std::int64_t row = 0; row < terms.rows; row += 8) multiply_rows<8>(terms, row);
}

void copy_block(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* into) {
  const __mmask16 lanes[] = {lanes_below(columns), lanes_below(columns - kLanes)};
  for (std::int64_t r = 0; r < kBlock; ++r, from += stride, into += kBlock)
    for (int v = 0; v < 2; ++v)
      _mm512_store_ps(into + v * kLanes,
                      r < rows ? _mm512_maskz_loadu_ps(lanes[v], from + v * kLanes) : _mm512_setzero_ps());
}

void transpose_block(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* into) {
  for (std::int64_t r = 0; r < kBlock; r += kLanes)
    for (std::int64_t c = 0; c < kBlock; c += kLanes)
      transpose_16(from + r * stride + c, stride, {rows - r, columns - c}, into + c * kBlock + r, kBlock);
}

void store_block(const float* sums, const Target& into) {
  store_rows(sums, into, [](__m512 value, const float*, __mmask16, std::int64_t) { return value; });
}

void store_with_bias(const float* sums, const float* bias, const Target& into) {
  store_rows(sums, into, [bias](__m512 value, const float*, __mmask16 lanes, std::int64_t column) {
    return _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, bias + column));
  });
}

void add_block(const float* sums, const Target& into) {
  store_rows(sums, into, [](__m512 value, const float* before, __mmask16 lanes, std::int64_t) {
    return _mm512_add_ps(_mm512_maskz_loadu_ps(lanes, before), value);
  });
}

}  // namespace shardtune::fp32
