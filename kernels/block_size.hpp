#pragma once
// Private to kernels/: the block of packed matrix products. Includes nothing but numbers (see bf16_tiles.hpp).
#include <cstdint>

namespace shardtune::packed {

inline constexpr std::int64_t kBlock = 32;  // rows and columns of sums

constexpr std::int64_t padded(std::int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

}  // namespace shardtune::packed
