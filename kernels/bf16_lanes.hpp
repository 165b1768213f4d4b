#pragma once
// Private to bf16_tiles.cpp and bf16_attention_block.cpp, compiled as they are (see bf16_tiles.hpp), hence the internal
// linkage: sixteen numbers at a time between bf16 in memory and fp32 in a register.
#include <cstdint>

#include <immintrin.h>

// As in simd_memory.hpp: always inlined, so no call's convention could differ where AVX-512 is off.
#pragma GCC diagnostic ignored "-Wpsabi"

namespace shardtune::bf16 {
namespace {

constexpr std::int64_t kLanes = 16;

// Lanes below `count`.
[[gnu::always_inline]] inline __mmask16 lanes_below(std::int64_t count) {
  return count >= kLanes ? __mmask16{0xFFFF} : count <= 0 ? __mmask16{0} : static_cast<__mmask16>((1U << count) - 1U);
}
[[gnu::always_inline]] inline __m512 load_bf16(const std::uint16_t* from, __mmask16 lanes) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(lanes, from)), 16));
}
[[gnu::always_inline]] inline void store_bf16(std::uint16_t* into, __mmask16 lanes, __m512 value) {
  _mm256_mask_storeu_epi16(into, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

}  // namespace
}  // namespace shardtune::bf16
