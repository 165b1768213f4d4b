#pragma once
// How the flat elements of one parameter are cut over ranks: into blocks whose size depends on the parameter alone, and
// whole blocks go to ranks. A slice is therefore contiguous, starts on a 1 KiB boundary of the fp32 tensor and may be
// empty. The gradient norm sums the same blocks, so it is independent of the number of ranks. An immutable value.
#include <cstdint>

namespace shardtune {

// max(256, bit_ceil(ceil(numel / 4096))): at most 4096 blocks per parameter.
std::int64_t block_numel(std::int64_t numel) noexcept;

class BlockLayout {
 public:
  // numel >= 0, num_ranks >= 1.
  BlockLayout(std::int64_t numel, int num_ranks) noexcept;

  std::int64_t numel() const noexcept { return numel_; }
  std::int64_t num_blocks() const noexcept { return num_blocks_; }
  int num_ranks() const noexcept { return num_ranks_; }

  // Rank q owns the blocks [first_block(q), first_block(q + 1)); q may be num_ranks() to ask for the end.
  std::int64_t first_block(int rank) const noexcept { return rank * num_blocks_ / num_ranks_; }
  std::int64_t num_blocks_of(int rank) const noexcept { return first_block(rank + 1) - first_block(rank); }
  // First element and number of elements of a rank's slice.
  std::int64_t begin(int rank) const noexcept;
  std::int64_t size(int rank) const noexcept { return begin(rank + 1) - begin(rank); }

 private:
  std::int64_t numel_;
  std::int64_t num_blocks_;
  int num_ranks_;
};

}  // namespace shardtune
