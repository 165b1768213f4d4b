#include "distributed/parallel/block_layout.hpp"

#include <algorithm>
#include <bit>

namespace shardtune {
namespace {

constexpr std::int64_t kMinBlockNumel = 256;
constexpr std::int64_t kMaxBlocks = 4096;

std::int64_t divide_up(std::int64_t a, std::int64_t b) noexcept { return (a + b - 1) / b; }

}  // namespace

std::int64_t block_numel(std::int64_t numel) noexcept {
  const auto wanted = static_cast<std::uint64_t>(divide_up(numel, kMaxBlocks));
  return std::max(kMinBlockNumel, static_cast<std::int64_t>(std::bit_ceil(wanted)));
}

BlockLayout::BlockLayout(std::int64_t numel, int num_ranks) noexcept
    : numel_(numel), num_blocks_(divide_up(numel, block_numel(numel))), num_ranks_(num_ranks) {}

std::int64_t BlockLayout::begin(int rank) const noexcept {
  return std::min(first_block(rank) * block_numel(numel_), numel_);
}

}  // namespace shardtune
