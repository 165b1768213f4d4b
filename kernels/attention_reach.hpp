#pragma once
// Private to kernels/: which keys a query sees. Included by sources that are compiled for one kind of processor, hence
// always inlined (see bf16_tiles.hpp).
#include <cstdint>

namespace shardtune {

// Query i sees key j where i - behind <= j <= i + ahead; both counted from the segment's start.
struct Reach {
  static constexpr std::int64_t kUnlimited = std::int64_t{1} << 40;
  std::int64_t behind = kUnlimited, ahead = kUnlimited;

  // The first key that row `row` of a segment sees, and one past the last that rows up to `row` see.
  [[gnu::always_inline]] std::int64_t first_key(std::int64_t row) const { return row > behind ? row - behind : 0; }
  [[gnu::always_inline]] std::int64_t end_key(std::int64_t row, std::int64_t num_keys) const {
    return row + ahead + 1 < num_keys ? row + ahead + 1 : num_keys;
  }
};

}  // namespace shardtune
