#include "kernels/fp32_lanes.hpp"

#include <immintrin.h>

// Compiled for AVX-512 (see CMakeLists.txt); no templates of the standard library in here.
namespace shardtune::fp32 {
namespace {

constexpr std::int64_t kLanes = 16;

__mmask16 lanes_below(std::int64_t n) {
  return n >= kLanes ? static_cast<__mmask16>(0xffff) : n <= 0 ? __mmask16{0} : static_cast<__mmask16>((1U << n) - 1U);
}

// kRows rows and 32 columns of c: 2 kRows sums, each waiting for its own last addition only.
template <int kRows>
void multiply_rows(const float* a, const float* b, float* c, std::int64_t depth, bool adds) {
  __m512 sum[kRows][2];
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) sum[r][v] = adds ? _mm512_load_ps(c + r * kBlock + v * kLanes) : _mm512_setzero_ps();
  for (std::int64_t k = 0; k < depth; ++k, b += kBlock) {
    const float* factors = a + k / kBlock * (kBlock * kBlock) + k % kBlock;
    const __m512 b0 = _mm512_load_ps(b), b1 = _mm512_load_ps(b + kLanes);
    for (int r = 0; r < kRows; ++r) {
      const __m512 factor = _mm512_set1_ps(factors[r * kBlock]);
      sum[r][0] = _mm512_fmadd_ps(factor, b0, sum[r][0]);
      sum[r][1] = _mm512_fmadd_ps(factor, b1, sum[r][1]);
    }
  }
  for (int r = 0; r < kRows; ++r)
    for (int v = 0; v < 2; ++v) _mm512_store_ps(c + r * kBlock + v * kLanes, sum[r][v]);
}

void transpose_16(const float* from, std::int64_t stride, std::int64_t rows, std::int64_t columns, float* into) {
  __m512 r[16], t[16];
  const __mmask16 lanes = lanes_below(columns);
  for (int i = 0; i < 16; ++i) r[i] = i < rows ? _mm512_maskz_loadu_ps(lanes, from + i * stride) : _mm512_setzero_ps();
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_shuffle_ps(t[i], t[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(t[i], t[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(t[i + 1], t[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_store_ps(into + i * kBlock, _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88));
    _mm512_store_ps(into + (i + 8) * kBlock, _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd));
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

void multiply(const float* a, const float* b, float* c, std::int64_t rows, std::int64_t depth, bool adds) {
  for (std::int64_t row = 0; row < rows; row += 8, a += 8 * kBlock, c += 8 * kBlock)
    multiply_rows<8>(a, b, c, depth, adds);
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
      transpose_16(from + r * stride + c, stride, rows - r, columns - c, into + c * kBlock + r);
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
