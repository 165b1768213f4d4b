#include "benchmarks/kernels/peak_loops.hpp"

#include <immintrin.h>

#define SHARDTUNE_AMX __attribute__((target("amx-tile,amx-bf16")))
#define SHARDTUNE_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#define SHARDTUNE_AVX512 __attribute__((target("avx512f")))
#define SHARDTUNE_AVX2 __attribute__((target("avx2,fma")))
#define SHARDTUNE_UNROLLED _Pragma("GCC unroll 32")

namespace shardtune::measurement {
namespace {

// Written out for each instruction set: a function that others are inlined into must have the instructions of their
// intrinsics, and without intrinsics GCC multiplies operands that never change once, before the loop.

constexpr int kSteps = 64;  // multiplications of each sum in a round

// --- AMX: sums in tiles 0 to 3, a in 4 and 5, b in 6 and 7; a multiplication is 16 x 16 x 32

struct alignas(64) TileConfig {
  std::uint8_t palette = 1, start_row = 0, reserved[14] = {};
  std::uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  std::uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
constexpr TileConfig kTileConfig;
constexpr int kTileNumbers = 16 * 32, kTileSteps = 8;  // 32 KiB of operands

SHARDTUNE_AMX float end_of_tiles() {
  float sums[4][256];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  _tile_release();
  return sums[0][0] + sums[1][1] + sums[2][2] + sums[3][3];
}

SHARDTUNE_AMX float amx_registers(const Numbers& numbers, std::int64_t rounds) {
  _tile_loadconfig(&kTileConfig);
  _tile_loadd(4, numbers.bf16, 64);
  _tile_loadd(5, numbers.bf16 + kTileNumbers, 64);
  _tile_loadd(6, numbers.bf16 + 2 * kTileNumbers, 64);
  _tile_loadd(7, numbers.bf16 + 3 * kTileNumbers, 64);
  for (std::int64_t round = 0; round < rounds; ++round) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < kSteps; ++step) {
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  return end_of_tiles();
}

SHARDTUNE_AMX float amx_l1(const Numbers& numbers, std::int64_t rounds) {
  _tile_loadconfig(&kTileConfig);
  for (std::int64_t round = 0; round < rounds; ++round) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int step = 0; step < kSteps; ++step) {
      const std::uint16_t* at = numbers.bf16 + step % kTileSteps * 4 * kTileNumbers;
      _tile_loadd(4, at, 64);
      _tile_loadd(6, at + 2 * kTileNumbers, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_loadd(7, at + 3 * kTileNumbers, 64);
      _tile_dpbf16ps(1, 4, 7);
      _tile_loadd(5, at + kTileNumbers, 64);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
  }
  return end_of_tiles();
}

// --- 32 registers of 512 bits: 24 sums; from the cache 8 rows of a, broadcast, times 48 columns of b

constexpr int kSums = 24, kRows = 8, kColumns = 3;

SHARDTUNE_AVX512 float total(const __m512 (&sums)[kSums]) {
  __m512 all = sums[0];
  for (int i = 1; i < kSums; ++i) all = _mm512_add_ps(all, sums[i]);
  return _mm512_reduce_add_ps(all);
}

SHARDTUNE_AVX512_BF16 __m512bh load_pairs(const std::uint16_t* from) {
  return reinterpret_cast<__m512bh>(_mm512_loadu_si512(from));
}

SHARDTUNE_AVX512_BF16 float avx512_bf16_registers(const Numbers& numbers, std::int64_t rounds) {
  __m512bh a[4], b[4];
  __m512 sums[kSums];
  SHARDTUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    a[i] = load_pairs(numbers.bf16 + 32 * i);
    b[i] = load_pairs(numbers.bf16 + 32 * (4 + i));
  }
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (std::int64_t step = 0; step < rounds * kSteps; ++step) {
    SHARDTUNE_UNROLLED
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_dpbf16_ps(sums[i], a[i % 4], b[i / 4 % 4]);
  }
  return total(sums);
}

SHARDTUNE_AVX512_BF16 float avx512_bf16_l1(const Numbers& numbers, std::int64_t rounds) {
  const std::uint16_t* const columns = numbers.bf16 + 2 * kRows * kSteps;
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (std::int64_t round = 0; round < rounds; ++round)
    for (int step = 0; step < kSteps; ++step) {
      const std::uint16_t *a = numbers.bf16 + 2 * kRows * step, *b = columns + 32 * kColumns * step;
      const __m512bh b0 = load_pairs(b), b1 = load_pairs(b + 32), b2 = load_pairs(b + 64);
      SHARDTUNE_UNROLLED
      for (int row = 0; row < kRows; ++row) {
        std::int32_t word;
        __builtin_memcpy(&word, a + 2 * row, sizeof word);
        const auto factor = reinterpret_cast<__m512bh>(_mm512_set1_epi32(word));
        sums[3 * row] = _mm512_dpbf16_ps(sums[3 * row], factor, b0);
        sums[3 * row + 1] = _mm512_dpbf16_ps(sums[3 * row + 1], factor, b1);
        sums[3 * row + 2] = _mm512_dpbf16_ps(sums[3 * row + 2], factor, b2);
      }
    }
  return total(sums);
}

SHARDTUNE_AVX512 float avx512_fp32_registers(const Numbers& numbers, std::int64_t rounds) {
  __m512 a[4], b[4], sums[kSums];
  SHARDTUNE_UNROLLED
  for (int i = 0; i < 4; ++i) {
    a[i] = _mm512_loadu_ps(numbers.fp32 + 16 * i);
    b[i] = _mm512_loadu_ps(numbers.fp32 + 16 * (4 + i));
  }
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (std::int64_t step = 0; step < rounds * kSteps; ++step) {
    SHARDTUNE_UNROLLED
    for (int i = 0; i < kSums; ++i) sums[i] = _mm512_fmadd_ps(a[i % 4], b[i / 4 % 4], sums[i]);
  }
  return total(sums);
}

SHARDTUNE_AVX512 float avx512_fp32_l1(const Numbers& numbers, std::int64_t rounds) {
  const float* const columns = numbers.fp32 + kRows * kSteps;
  __m512 sums[kSums];
  for (__m512& sum : sums) sum = _mm512_setzero_ps();
  for (std::int64_t round = 0; round < rounds; ++round)
    for (int step = 0; step < kSteps; ++step) {
      const float *a = numbers.fp32 + kRows * step, *b = columns + 16 * kColumns * step;
      const __m512 b0 = _mm512_loadu_ps(b), b1 = _mm512_loadu_ps(b + 16), b2 = _mm512_loadu_ps(b + 32);
      SHARDTUNE_UNROLLED
      for (int row = 0; row < kRows; ++row) {
        const __m512 factor = _mm512_set1_ps(a[row]);
        sums[3 * row] = _mm512_fmadd_ps(factor, b0, sums[3 * row]);
        sums[3 * row + 1] = _mm512_fmadd_ps(factor, b1, sums[3 * row + 1]);
        sums[3 * row + 2] = _mm512_fmadd_ps(factor, b2, sums[3 * row + 2]);
      }
    }
  return total(sums);
}

// --- 16 registers of 256 bits: 12 sums; from the cache 6 rows of a times 16 columns of b

constexpr int kNarrowSums = 12, kNarrowRows = 6, kNarrowColumns = 2;

SHARDTUNE_AVX2 float narrow_total(const __m256 (&sums)[kNarrowSums]) {
  float lanes[8], all = 0;
  for (const __m256& sum : sums) {
    _mm256_storeu_ps(lanes, sum);
    for (const float lane : lanes) all += lane;
  }
  return all;
}

SHARDTUNE_AVX2 float avx2_fp32_registers(const Numbers& numbers, std::int64_t rounds) {
  __m256 a[2], b[2], sums[kNarrowSums];
  SHARDTUNE_UNROLLED
  for (int i = 0; i < 2; ++i) {
    a[i] = _mm256_loadu_ps(numbers.fp32 + 8 * i);
    b[i] = _mm256_loadu_ps(numbers.fp32 + 8 * (2 + i));
  }
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (std::int64_t step = 0; step < rounds * kSteps; ++step) {
    SHARDTUNE_UNROLLED
    for (int i = 0; i < kNarrowSums; ++i) sums[i] = _mm256_fmadd_ps(a[i % 2], b[i / 2 % 2], sums[i]);
  }
  return narrow_total(sums);
}

SHARDTUNE_AVX2 float avx2_fp32_l1(const Numbers& numbers, std::int64_t rounds) {
  const float* const columns = numbers.fp32 + kNarrowRows * kSteps;
  __m256 sums[kNarrowSums];
  for (__m256& sum : sums) sum = _mm256_setzero_ps();
  for (std::int64_t round = 0; round < rounds; ++round)
    for (int step = 0; step < kSteps; ++step) {
      const float *a = numbers.fp32 + kNarrowRows * step, *b = columns + 8 * kNarrowColumns * step;
      const __m256 b0 = _mm256_loadu_ps(b), b1 = _mm256_loadu_ps(b + 8);
      SHARDTUNE_UNROLLED
      for (int row = 0; row < kNarrowRows; ++row) {
        const __m256 factor = _mm256_broadcast_ss(a + row);
        sums[2 * row] = _mm256_fmadd_ps(factor, b0, sums[2 * row]);
        sums[2 * row + 1] = _mm256_fmadd_ps(factor, b1, sums[2 * row + 1]);
      }
    }
  return narrow_total(sums);
}

}  // namespace

const PeakLoop kAmxRegisters = {2.0 * 16 * 16 * 32 * 4 * kSteps, amx_registers};
const PeakLoop kAmxL1 = {2.0 * 16 * 16 * 32 * 4 * kSteps, amx_l1};
const PeakLoop kAvx512Bf16Registers = {2.0 * 32 * kSums * kSteps, avx512_bf16_registers};
const PeakLoop kAvx512Bf16L1 = {2.0 * 32 * kSums * kSteps, avx512_bf16_l1};
const PeakLoop kAvx512Fp32Registers = {2.0 * 16 * kSums * kSteps, avx512_fp32_registers};
const PeakLoop kAvx512Fp32L1 = {2.0 * 16 * kSums * kSteps, avx512_fp32_l1};
const PeakLoop kAvx2Fp32Registers = {2.0 * 8 * kNarrowSums * kSteps, avx2_fp32_registers};
const PeakLoop kAvx2Fp32L1 = {2.0 * 8 * kNarrowSums * kSteps, avx2_fp32_l1};

void copy_past_caches(const char* from, char* into, std::int64_t num_bytes) {
  const auto* source = reinterpret_cast<const __m128i*>(from);
  auto* target = reinterpret_cast<__m128i*>(into);
  for (std::int64_t i = 0; i < num_bytes / 16; i += 4) {
    SHARDTUNE_UNROLLED
    for (int j = 0; j < 4; ++j) _mm_stream_si128(target + i + j, _mm_load_si128(source + i + j));
  }
  _mm_sfence();
}

}  // namespace shardtune::measurement
