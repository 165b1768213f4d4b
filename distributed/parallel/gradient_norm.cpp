#include "distributed/parallel/gradient_norm.hpp"

#include <algorithm>
#include <array>
#include <cmath>

#include <ATen/ops/empty.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

void append_block_sums(const ShardedParameter& p, std::vector<double>& out) {
  const at::Tensor slice = p.slice_of(p.gradient);
  const float* values = slice.const_data_ptr<float>();
  const std::int64_t block = block_numel(p.layout.numel());
  for (std::int64_t first = 0; first < slice.numel(); first += block) {
    out.push_back(sum_of_squares(values + first, std::min(block, slice.numel() - first)));
  }
}

}  // namespace

double sum_of_squares(const float* values, std::int64_t count) noexcept {
  constexpr std::int64_t kLanes = 8;
  std::array<double, kLanes> lanes{};
  std::int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) {
    for (std::int64_t lane = 0; lane < kLanes; ++lane) {
      const double value = values[i + lane];
      lanes[static_cast<std::size_t>(lane)] += value * value;
    }
  }
  for (std::int64_t lane = 0; i + lane < count; ++lane) {
    const double value = values[i + lane];
    lanes[static_cast<std::size_t>(lane)] += value * value;
  }
  return ((lanes[0] + lanes[1]) + (lanes[2] + lanes[3])) + ((lanes[4] + lanes[5]) + (lanes[6] + lanes[7]));
}

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
  std::vector<double> own;
  std::vector<std::int64_t> counts(static_cast<std::size_t>(world.size()), 0);
  std::int64_t num_blocks = 0;
  for (const ShardedParameter* p : parameters) {
    check_internal(p->gradient.defined(), "gradient_norm: a gradient is missing");
    append_block_sums(*p, own);
    for (int rank = 0; rank < world.size(); ++rank)
      counts[static_cast<std::size_t>(rank)] += p->layout.num_blocks_of(rank);
    num_blocks += p->layout.num_blocks();
  }
  at::Tensor in = at::empty({static_cast<std::int64_t>(own.size())}, at::kDouble);
  std::copy(own.begin(), own.end(), in.mutable_data_ptr<double>());
  const at::Tensor all = at::empty({num_blocks}, at::kDouble);
  world.all_gather(all, in, counts).wait();
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
