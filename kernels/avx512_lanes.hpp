#pragma once
// Private to the sources of this folder that are compiled for AVX-512 as a whole (see bf16_tiles.hpp), hence the
// internal linkage.
#include <cstdint>

#include <immintrin.h>

// As in simd_memory.hpp: always inlined, so no call's convention could differ where AVX-512 is off.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace shardtune::avx512 {
namespace {

constexpr std::int64_t kLanes = 16;

// Lanes below `count`.
[[gnu::always_inline]] inline __mmask16 lanes_below(std::int64_t count) {
  return count >= kLanes ? __mmask16{0xFFFF} : count <= 0 ? __mmask16{0} : static_cast<__mmask16>((1U << count) - 1U);
}

struct Size {
  std::int64_t rows = kLanes, columns = kLanes;
};

// into [16, 16] = transposed `from`, of which there are at most 16 rows and columns; zeros for the others. 32-bit
// numbers of any kind.
template <class Number>
[[gnu::always_inline]] inline void transpose_16(const Number* from, std::int64_t stride, Size size, Number* into,
                                                std::int64_t into_stride) {
  __m512i r[16], t[16];
  const __mmask16 lanes = lanes_below(size.columns);
  for (int i = 0; i < 16; ++i)
    r[i] = i < size.rows ? _mm512_maskz_loadu_epi32(lanes, from + i * stride) : _mm512_setzero_si512();
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 8; ++i) {
    _mm512_storeu_si512(into + i * into_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88));
    _mm512_storeu_si512(into + (i + 8) * into_stride, _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd));
  }
}

}  // namespace
}  // namespace shardtune::avx512
