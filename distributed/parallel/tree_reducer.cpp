#include "distributed/parallel/tree_reducer.hpp"

#include <algorithm>
#include <utility>

#include <ATen/core/grad_mode.h>

#include "core/error.hpp"

namespace shardtune {

TreeReducer::TreeReducer(const ShardContext& context, GradientProbe probe)
    : context_(context), probe_(std::move(probe)) {}

void TreeReducer::begin_step(const RoundSchedule& schedule) {
  schedule_ = schedule;
  forget_finishing();
  under_way_ = nullptr;
  sums_.clear();
  count_partials();
}

TreeReducer::UnitSums& TreeReducer::sums(ShardUnit& unit) {
  check_internal(schedule_.has_value(), "TreeReducer: no step has begun");
  return sums_.try_emplace(&unit, schedule_->num_micro_batches()).first->second;
}

TreeReducer::Axis TreeReducer::shard_axis(const ShardUnit& unit) const {
  Axis axis{.ranks = {context_.grid.shards(), context_.buffers.shards, unit.shard_counts()}, .ranges = {}};
  for (int shard = 0; shard < context_.grid.num_shards(); ++shard)
    axis.ranges.push_back(schedule_->range(shard, context_.grid.replica()));
  return axis;
}

TreeReducer::Axis TreeReducer::replica_axis(const ShardUnit& unit) const {
  Axis axis{.ranks = {context_.grid.replicas(), context_.buffers.replicas, {}}, .ranges = {}};
  const int num_replicas = context_.grid.num_replicas();
  for (int replica = 0; replica < num_replicas; ++replica) {
    const int rank = context_.grid.shard() * num_replicas + replica;
    axis.ranks.counts.push_back(unit.packed_counts()[static_cast<std::size_t>(rank)]);
    axis.ranges.push_back(schedule_->range_of_replica(replica));
  }
  return axis;
}

void TreeReducer::add(ShardUnit& unit, std::int64_t round) {
  UnitSums& unit_sums = sums(unit);
  const int num_shards = context_.grid.num_shards();
  const int num_replicas = context_.grid.num_replicas();
  const std::int64_t own_index = schedule_->micro_batch(context_.grid.world().rank(), round);
  Pieces gradients;
  if (own_index >= 0) {
    gradients = unit.take_gradients();
    if (probe_) probe_(unit.unit().name, gradients);
  } else {
    unit.drop_gradients();
  }
  if (num_shards > 1 && context_.plan.reduce_every_microbatch) {
    Contributions contributions;
    for (int shard = 0; shard < num_shards; ++shard) {
      const std::int64_t index = schedule_->micro_batch(shard * num_replicas + context_.grid.replica(), round);
      contributions.push_back(index >= 0 ? std::optional(TreeNode{0, index}) : std::nullopt);
    }
    if (under_way_ != nullptr) merge(*under_way_);
    std::vector<Pieces> parts;
    if (own_index >= 0) parts = unit.slices_of_shards(gradients);
    gradients.clear();  // freed as soon as they are in buckets
    issue(unit_sums, unit_sums.shard, shard_axis(unit), std::move(parts), contributions);
    under_way_ = &unit_sums;
  } else if (own_index >= 0) {
    round_leaves(gradients);
    (num_shards > 1 ? unit_sums.local : unit_sums.shard).add({0, own_index}, std::move(gradients));
  }
  count_partials();
}

// As they would have been rounded had they been sent before they were summed; in place, a little at a time.
void TreeReducer::round_leaves(const Pieces& gradients) const {
  constexpr std::int64_t kNumel = 1 << 18;
  if (context_.reduce_dtype == at::kFloat) return;
  const at::NoGradGuard no_grad;
  for (const at::Tensor& gradient : gradients) {
    for (std::int64_t begin = 0; begin < gradient.numel(); begin += kNumel) {
      at::Tensor part = gradient.narrow(0, begin, std::min(kNumel, gradient.numel() - begin));
      part.copy_(part.to(context_.reduce_dtype));
    }
  }
}

void TreeReducer::issue(UnitSums& sums, TreeAccumulator& into, const Axis& axis, std::vector<Pieces> parts,
                        const Contributions& contributions) {
  // The leaves were rounded to the reduce dtype, sums are not: what holds one goes as it is.
  const bool has_leaves_only = std::all_of(contributions.begin(), contributions.end(), [&](const auto& node) {
    return !node || num_leaves_under(*node, schedule_->num_micro_batches()) == 1;
  });
  const TreeExchange::Nodes nodes{.of_ranks = contributions,
                                  .num_leaves = schedule_->num_micro_batches(),
                                  .dtype = has_leaves_only ? context_.reduce_dtype : at::kFloat};
  sums.exchanges.push_back({std::make_unique<TreeExchange>(axis.ranks, nodes, std::move(parts)), &into});
}

void TreeReducer::issue_subtrees(UnitSums& sums, TreeAccumulator& from, TreeAccumulator& into, const Axis& axis,
                                 const Cut& cut) {
  std::vector<std::vector<TreeNode>> nodes;  // of every rank
  std::size_t num_exchanges = 0;
  for (const auto& [begin, end] : axis.ranges) {
    nodes.push_back(covering_nodes(begin, end, schedule_->num_micro_batches()));
    num_exchanges = std::max(num_exchanges, nodes.back().size());
  }
  std::vector<TreeAccumulator::Entry> own = from.take_nodes();
  const std::vector<TreeNode>& expected = nodes[static_cast<std::size_t>(axis.ranks.ranks.rank())];
  check_internal(own.size() == expected.size(), "TreeReducer: a micro-batch of this rank is missing");
  for (std::size_t i = 0; i < num_exchanges; ++i) {
    Contributions contributions;
    for (const auto& of_rank : nodes)
      contributions.push_back(i < of_rank.size() ? std::optional(of_rank[i]) : std::nullopt);
    check_internal(i >= own.size() || own[i].first == expected[i], "TreeReducer: unexpected partial sum");
    std::vector<Pieces> parts;
    if (i < own.size()) parts = cut(std::exchange(own[i].second, {}));
    issue(sums, into, axis, std::move(parts), contributions);
  }
}

void TreeReducer::issue_over_shards(ShardUnit& unit, UnitSums& sums) {
  issue_subtrees(sums, sums.local, sums.shard, shard_axis(unit),
                 [&](const Pieces& whole) { return unit.slices_of_shards(whole); });
}

void TreeReducer::issue_over_replicas(ShardUnit& unit, UnitSums& sums) {
  const Axis axis = replica_axis(unit);
  issue_subtrees(sums, sums.shard, sums.owned, axis, [&](const Pieces& sum) {
    if (context_.grid.num_shards() == 1) {
      if (sums.spare.empty()) sums.spare = sum;
      return unit.slices_of_ranks(sum);
    }
    std::vector<Pieces> parts;
    for (const at::Tensor& part : split_bucket(sum.front(), axis.ranks.counts)) parts.push_back({part});
    return parts;
  });
}

void TreeReducer::merge(UnitSums& sums) {
  for (Exchange& exchange : sums.exchanges) {
    for (auto& [node, sum] : exchange.exchange->finish()) exchange.into->add(node, std::move(sum));
  }
  sums.exchanges.clear();
  if (under_way_ == &sums) under_way_ = nullptr;
}

bool TreeReducer::advance(ShardUnit& unit) {
  UnitSums& unit_sums = sums(unit);
  const bool has_replicas = context_.grid.num_replicas() > 1;
  for (;;) {
    switch (unit_sums.stage++) {
      case 0:
        if (context_.grid.num_shards() > 1 && !context_.plan.reduce_every_microbatch)
          issue_over_shards(unit, unit_sums);
        if (!unit_sums.exchanges.empty()) return true;
        break;
      case 1:
        merge(unit_sums);
        if (!has_replicas) break;
        issue_over_replicas(unit, unit_sums);
        return true;
      case 2:
        merge(unit_sums);
        unit.begin_gradients((has_replicas ? unit_sums.owned : unit_sums.shard).take_root(),
                             std::exchange(unit_sums.spare, {}));
        if (has_replicas) return true;
        break;
      default:
        unit.finish_gradients();
        sums_.erase(&unit);
        return false;
    }
  }
}

void TreeReducer::count_partials() {
  std::int64_t bytes = 0;
  for (const auto& [unit, unit_sums] : sums_) {
    bytes += unit_sums.local.num_bytes() + unit_sums.shard.num_bytes() + unit_sums.owned.num_bytes() +
             num_elements(unit_sums.spare) * static_cast<std::int64_t>(sizeof(float));
    for (const Exchange& exchange : unit_sums.exchanges) bytes += exchange.exchange->num_bytes();
  }
  context_.memory.partial_sums.set(bytes);
}

}  // namespace shardtune
