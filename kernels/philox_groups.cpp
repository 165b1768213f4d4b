#include "kernels/philox_groups.hpp"

// Compiled for AVX-512 (see CMakeLists.txt); no templates of the standard library in here.
#if defined(__x86_64__)
#include <immintrin.h>

namespace shardtune {
namespace {

struct Product {
  __m512i low, high;
};

inline Product multiply(__m512i x, __m512i by) {
  constexpr __mmask16 kOdd = 0xAAAA;
  const __m512i even = _mm512_mul_epu32(x, by), odd = _mm512_mul_epu32(_mm512_srli_epi64(x, 32), by);
  return {_mm512_mask_blend_epi32(kOdd, even, _mm512_slli_epi64(odd, 32)),
          _mm512_mask_blend_epi32(kOdd, _mm512_srli_epi64(even, 32), odd)};
}

__m512i broadcast(std::uint64_t word) { return _mm512_set1_epi32(static_cast<int>(static_cast<std::uint32_t>(word))); }

// Groups side by side hide how long a product takes.
template <int count>
void make_groups(std::uint64_t key, std::uint64_t group, std::uint64_t row, PhiloxGroup* into) {
  const __m512i by_0 = broadcast(0xD2511F53U), by_2 = broadcast(0xCD9E8D57U);
  const __m512i numbers = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
  __m512i c[count][4];
  for (int g = 0; g < count; ++g) {
    const std::uint64_t first = (group + static_cast<std::uint64_t>(g)) * 16;
    c[g][0] = _mm512_add_epi32(numbers, broadcast(first));  // first is a multiple of 16: no carry
    c[g][1] = broadcast(first >> 32);
    c[g][2] = broadcast(row);
    c[g][3] = broadcast(row >> 32);
  }
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int g = 0; g < count; ++g) {
      const Product a = multiply(c[g][0], by_0), b = multiply(c[g][2], by_2);
      c[g][0] = _mm512_xor_si512(_mm512_xor_si512(b.high, c[g][1]), broadcast(k0));
      c[g][2] = _mm512_xor_si512(_mm512_xor_si512(a.high, c[g][3]), broadcast(k1));
      c[g][1] = b.low;
      c[g][3] = a.low;
    }
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
  for (int g = 0; g < count; ++g) {
    for (int w = 0; w < 4; ++w) _mm512_storeu_si512(into[g].words[w], c[g][w]);
  }
}

}  // namespace

void philox_groups_avx512(std::uint64_t key, std::uint64_t group, std::uint64_t row, PhiloxGroup* into,
                          std::int64_t count) {
  switch (count) {
    case 1: return make_groups<1>(key, group, row, into);
    case 2: return make_groups<2>(key, group, row, into);
    case 3: return make_groups<3>(key, group, row, into);
    default: return make_groups<4>(key, group, row, into);
  }
}

}  // namespace shardtune
#endif
