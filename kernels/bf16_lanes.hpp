#pragma once
// Private to bf16_tiles.cpp and bf16_attention_block.cpp, compiled as they are (see bf16_tiles.hpp), hence the internal
// linkage: sixteen numbers at a time between bf16 in memory and fp32 in a register.
#include <cstdint>

#include "kernels/avx512_lanes.hpp"

namespace shardtune::bf16 {
namespace {

using avx512::kLanes;
using avx512::lanes_below;

[[gnu::always_inline]] inline __m512 widened(__m256i bits) {
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
[[gnu::always_inline]] inline __m512 load_bf16(const std::uint16_t* from, __mmask16 lanes) {
  return widened(_mm256_maskz_loadu_epi16(lanes, from));
}
[[gnu::always_inline]] inline void store_bf16(std::uint16_t* into, __mmask16 lanes, __m512 value) {
  _mm256_mask_storeu_epi16(into, lanes, reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(value)));
}

}  // namespace
}  // namespace shardtune::bf16
