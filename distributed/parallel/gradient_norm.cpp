#include "distributed/parallel/gradient_norm.hpp"

#include <algorithm>
#include <cmath>

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>

#include "core/error.hpp"
#include "kernels/sum_of_squares.hpp"

namespace shardtune {
namespace {

struct Block {
  const float* values;
  std::int64_t begin;  // in all blocks together
  std::int64_t count;
};

void append_blocks(const ShardedParameter& p, std::vector<Block>& blocks) {
  const at::Tensor slice = p.slice_of(p.gradient);
  const auto* values = slice.const_data_ptr<float>();
  const std::int64_t block = block_numel(p.layout.numel());
  for (std::int64_t first = 0; first < slice.numel(); first += block) {
    const std::int64_t begin = blocks.empty() ? 0 : blocks.back().begin + blocks.back().count;
    blocks.push_back({values + first, begin, std::min(block, slice.numel() - first)});
  }
}

// Threads get equal numbers of elements, blocks differ in size. Every block is summed by one thread.
at::Tensor sums_of(const std::vector<Block>& blocks) {
  constexpr std::int64_t kGrain = 1 << 16;
  at::Tensor sums = at::empty({std::ssize(blocks)}, at::kDouble);
  auto* const out = sums.mutable_data_ptr<double>();
  const std::int64_t numel = blocks.empty() ? 0 : blocks.back().begin + blocks.back().count;
  at::parallel_for(0, numel, kGrain, [&](std::int64_t begin, std::int64_t end) {
    auto block = std::lower_bound(blocks.begin(), blocks.end(), begin,
                                  [](const Block& b, std::int64_t element) { return b.begin < element; });
    for (; block != blocks.end() && block->begin < end; ++block)
      out[block - blocks.begin()] = sum_of_squares(block->values, block->count);
  });
  return sums;
}

}  // namespace

double tree_sum(std::vector<double> values) noexcept {
  if (values.empty()) return 0.0;
  while (values.size() > 1) {
    const std::size_t half = values.size() / 2;
    const bool is_odd = values.size() % 2 != 0;
    for (std::size_t i = 0; i < half; ++i) values[i] = values[2 * i] + values[2 * i + 1];
    if (is_odd) values[half] = values.back();
    values.resize(half + (is_odd ? 1 : 0));
  }
  return values.front();
}

double gradient_norm(Communicator& world, std::span<ShardedParameter* const> parameters) {
  std::vector<Block> own;
  std::vector<std::int64_t> counts(static_cast<std::size_t>(world.size()), 0);
  std::int64_t num_blocks = 0;
  for (const ShardedParameter* p : parameters) {
    check_internal(p->gradient.defined(), "gradient_norm: a gradient is missing");
    append_blocks(*p, own);
    for (int rank = 0; rank < world.size(); ++rank)
      counts[static_cast<std::size_t>(rank)] += p->layout.num_blocks_of(rank);
    num_blocks += p->layout.num_blocks();
  }
  const at::Tensor all = at::empty({num_blocks}, at::kDouble);
  world.all_gather(all, sums_of(own), counts).wait();
  // Received by rank, then by parameter; wanted by parameter, then by rank (which is block order).
  std::vector<const double*> next_of_rank;
  const double* start = all.const_data_ptr<double>();
  for (const std::int64_t count : counts) {
    next_of_rank.push_back(start);
    start += count;
  }
  double total = 0.0;
  for (const ShardedParameter* p : parameters) {
    std::vector<double> blocks;
    for (int rank = 0; rank < world.size(); ++rank) {
      const double*& next = next_of_rank[static_cast<std::size_t>(rank)];
      blocks.insert(blocks.end(), next, next + p->layout.num_blocks_of(rank));
      next += p->layout.num_blocks_of(rank);
    }
    total += tree_sum(std::move(blocks));
  }
  return std::sqrt(total);
}

double clip_factor(double norm, double max_norm) noexcept {
  return max_norm > 0 ? std::min(1.0, max_norm / (norm + 1e-6)) : 1.0;
}

}  // namespace shardtune
