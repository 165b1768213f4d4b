#include "distributed/parallel/tree_reducer.hpp"

#include <algorithm>
#include <utility>

#include <ATen/core/grad_mode.h>

#include "core/error.hpp"

namespace shardtune {

TreeReducer::TreeReducer(const ShardContext& context, GradientProbe probe)
    : GradientReducer(context, std::move(probe)) {}

TreeReducer::UnitSums& TreeReducer::sums(ShardUnit& unit) {
  return sums_.try_emplace(&unit, schedule().num_micro_batches()).first->second;
}

TreeReducer::Axis TreeReducer::shard_axis(const ShardUnit& unit) const {
  Axis axis{.ranks = over_shards(unit), .ranges = {}};
  for (int shard = 0; shard < context_.grid.num_shards(); ++shard)
    axis.ranges.push_back(schedule().range(shard, context_.grid.replica()));
  return axis;
}

TreeReducer::Axis TreeReducer::replica_axis(const ShardUnit& unit) const {
  Axis axis{.ranks = over_replicas(unit), .ranges = {}};
  for (int replica = 0; replica < context_.grid.num_replicas(); ++replica)
    axis.ranges.push_back(schedule().range_of_replica(replica));
  return axis;
}

void TreeReducer::add(ShardUnit& unit, std::int64_t round) {
  UnitSums& unit_sums = sums(unit);
  const int num_shards = context_.grid.num_shards();
  const int num_replicas = context_.grid.num_replicas();
  const std::int64_t own_index = schedule().micro_batch(context_.grid.world().rank(), round);
  Pieces gradients;
  if (own_index >= 0) {
    gradients = take_gradients(unit);
  } else {
    unit.drop_gradients();
  }
  if (num_shards > 1 && context_.plan.reduce_every_microbatch) {
    Contributions contributions;
    for (int shard = 0; shard < num_shards; ++shard) {
      const std::int64_t index = schedule().micro_batch(shard * num_replicas + context_.grid.replica(), round);
      contributions.push_back(index >= 0 ? std::optional(TreeNode{0, index}) : std::nullopt);
    }
    merge_earlier_adds(unit);
    std::vector<Pieces> parts;
    if (own_index >= 0) parts = unit.slices_of_shards(gradients);
    gradients.clear();  // freed as soon as they are in buckets
    issue(unit_sums, unit_sums.shard, shard_axis(unit), std::move(parts), contributions);
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
    return !node || num_leaves_under(*node, schedule().num_micro_batches()) == 1;
  });
  const TreeExchange::Nodes nodes{.of_ranks = contributions,
                                  .num_leaves = schedule().num_micro_batches(),
                                  .dtype = has_leaves_only ? context_.reduce_dtype : at::kFloat};
  sums.exchanges.push_back({std::make_unique<TreeExchange>(axis.ranks, nodes, std::move(parts)), &into});
}

void TreeReducer::issue_subtrees(UnitSums& sums, TreeAccumulator& from, TreeAccumulator& into, const Axis& axis,
                                 const Cut& cut) {
  std::vector<std::vector<TreeNode>> nodes;  // of every rank
  std::size_t num_exchanges = 0;
  for (const auto& [begin, end] : axis.ranges) {
    nodes.push_back(covering_nodes(begin, end, schedule().num_micro_batches()));
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

bool TreeReducer::start_over_shards(ShardUnit& unit) {
  UnitSums& unit_sums = sums(unit);
  if (context_.grid.num_shards() > 1 && !context_.plan.reduce_every_microbatch)
    issue_subtrees(unit_sums, unit_sums.local, unit_sums.shard, shard_axis(unit),
                   [&](const Pieces& whole) { return unit.slices_of_shards(whole); });
  return !unit_sums.exchanges.empty();
}

bool TreeReducer::is_all_reduce(const Axis& replicas) const {
  std::vector<std::optional<TreeNode>> nodes;
  for (const auto& [begin, end] : replicas.ranges) {
    const std::vector<TreeNode> of_replica = covering_nodes(begin, end, schedule().num_micro_batches());
    if (of_replica.size() != 1) return false;
    nodes.emplace_back(of_replica.front());
  }
  const bool is_rounded = nodes.front()->level == 0 && context_.reduce_dtype != at::kFloat;
  return !is_rounded && parent_in_order(nodes, schedule().num_micro_batches()).has_value();
}

bool TreeReducer::start_over_replicas(ShardUnit& unit) {
  UnitSums& unit_sums = sums(unit);
  const Axis axis = replica_axis(unit);
  if (is_all_reduce(axis)) {
    std::vector<TreeAccumulator::Entry> own = unit_sums.shard.take_nodes();
    check_internal(own.size() == 1, "TreeReducer: a micro-batch of this rank is missing");
    sums_.erase(&unit);
    unit.begin_all_reduce(std::move(own.front().second), at::kFloat);
    return true;
  }
  issue_subtrees(unit_sums, unit_sums.shard, unit_sums.owned, axis, [&](const Pieces& sum) {
    if (context_.grid.num_shards() == 1 && unit_sums.spare.empty()) unit_sums.spare = sum;
    return unit.slices_of_replicas(sum);
  });
  return false;
}

GradientReducer::Result TreeReducer::take_result(ShardUnit& unit) {
  UnitSums& unit_sums = sums(unit);
  TreeAccumulator& finished = context_.grid.num_replicas() > 1 ? unit_sums.owned : unit_sums.shard;
  Result result{.own_part = finished.take_root(), .spare = std::move(unit_sums.spare)};
  sums_.erase(&unit);
  return result;
}

void TreeReducer::merge_received(ShardUnit& unit) {
  UnitSums& unit_sums = sums(unit);
  for (Exchange& exchange : unit_sums.exchanges) {
    for (auto& [node, sum] : exchange.exchange->finish()) exchange.into->add(node, std::move(sum));
  }
  unit_sums.exchanges.clear();
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
