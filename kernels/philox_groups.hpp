#pragma once
// Private to kernels/: many blocks of Philox4x32-10 (Salmon et al. 2011) at a time, the same words as core/rng.hpp's.
#include <cstdint>

namespace shardtune {

inline constexpr std::int64_t kGroupsAtOnce = 4;
struct PhiloxGroup {
  std::uint32_t words[4][16];  // word w of block i of sixteen with consecutive counters
};

// into[g], g < count <= kGroupsAtOnce: blocks whose counters are (low = 16 (group + g) + 0..15, high = row). Only where
// instruction_set() is avx512 or better: compilers know no widening product of 32-bit lanes outside of intrinsics and
// multiply 64 bits, which takes three times as long.
void philox_groups_avx512(std::uint64_t key, std::uint64_t group, std::uint64_t row, PhiloxGroup* into,
                          std::int64_t count);

}  // namespace shardtune
