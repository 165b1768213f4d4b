#pragma once
// Private to kernels/: the block of packed matrix products. Includes nothing but numbers (see bf16_tiles.hpp).
#include <cstdint>

namespace shardtune::packed {

inline constexpr std::int64_t kBlock = 32;  // rows and columns of sums

constexpr std::int64_t padded(std::int64_t n) { return (n + kBlock - 1) / kBlock * kBlock; }

// c [32, 32] = or += the first `rows` rows of 32 of the left side by a panel of the right one, packed as Units have
// them. Rows of c from `rows` on may hold anything afterwards.
template <class Number>
struct BlockTerms {
  const Number* left;
  const Number* panel;
  float* c;
  std::int64_t rows, depth;
  bool adds;
};

}  // namespace shardtune::packed
