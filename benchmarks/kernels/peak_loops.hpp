#pragma once
// What one core can multiply at most, by instruction set: loops that do nothing else. `registers`: operands stay in
// registers; `l1`: they come from the first-level cache, as those of a packed matrix product do at best, with as many
// sums in registers as there is room for. Numbers must be random: on zeros a processor clocks higher. A loop may only
// be called on a processor that has its instructions.
#include <cstdint>

namespace shardtune::measurement {

struct alignas(64) Numbers {
  std::uint16_t bf16[16384];  // 32 KiB each
  float fp32[8192];
};

// Runs `rounds` times; the result depends on all sums, so that none is left out.
struct PeakLoop {
  double flops_of_round;
  float (*run)(const Numbers& numbers, std::int64_t rounds);
};

extern const PeakLoop kAmxRegisters, kAmxL1, kAvx512Bf16Registers, kAvx512Bf16L1, kAvx512Fp32Registers, kAvx512Fp32L1,
    kAvx2Fp32Registers, kAvx2Fp32L1;

// Copies past the caches; dense, 16-byte aligned, a multiple of 64 bytes.
void copy_past_caches(const char* from, char* into, std::int64_t num_bytes);

}  // namespace shardtune::measurement
