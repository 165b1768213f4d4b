#include "distributed/parallel/tree_reducer.hpp"

#include <algorithm>
#include <numeric>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include "core/error.hpp"

namespace shardtune {

TreeReducer::TreeReducer(const ShardContext& context, GradientProbe probe)
    : context_(context), probe_(std::move(probe)) {}

void TreeReducer::begin_step(const RoundSchedule& schedule) {
  schedule_ = schedule;
  finishing_.clear();
  under_way_ = nullptr;
  sums_.clear();
  count_partials();
}

TreeReducer::UnitSums& TreeReducer::sums(ShardUnit& unit) {
  check_internal(schedule_.has_value(), "TreeReducer: no step has begun");
  return sums_.try_emplace(&unit, schedule_->num_micro_batches()).first->second;
}

TreeReducer::Axis TreeReducer::shard_axis(const ShardUnit& unit) const {
  Axis axis{.ranks = context_.grid.shards(), .counts = unit.shard_counts(), .ranges = {}};
  for (int shard = 0; shard < axis.ranks.size(); ++shard)
    axis.ranges.push_back(schedule_->range(shard, context_.grid.replica()));
  return axis;
}

TreeReducer::Axis TreeReducer::replica_axis(const ShardUnit& unit) const {
  Axis axis{.ranks = context_.grid.replicas(), .counts = {}, .ranges = {}};
  const int num_replicas = axis.ranks.size();
  for (int replica = 0; replica < num_replicas; ++replica) {
    const int rank = context_.grid.shard() * num_replicas + replica;
    axis.counts.push_back(unit.packed_counts()[static_cast<std::size_t>(rank)]);
    axis.ranges.push_back(schedule_->range_of_replica(replica));
  }
  return axis;
}

void TreeReducer::add(ShardUnit& unit, std::int64_t round) {
  UnitSums& unit_sums = sums(unit);
  const int num_shards = context_.grid.num_shards();
  const int num_replicas = context_.grid.num_replicas();
  const std::int64_t own_index = schedule_->micro_batch(context_.grid.world().rank(), round);
  at::Tensor packed;
  if (own_index >= 0) {
    packed = unit.pack_gradients();
    if (probe_) probe_(unit.unit().name, packed);
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
    issue(unit_sums, unit_sums.shard, shard_axis(unit), packed, contributions);
    under_way_ = &unit_sums;
  } else if (own_index >= 0) {
    (num_shards > 1 ? unit_sums.local : unit_sums.shard).add({0, own_index}, packed.to(at::kFloat));
  }
  count_partials();
}

void TreeReducer::issue(UnitSums& sums, TreeAccumulator& into, const Axis& axis, const at::Tensor& packed,
                        const Contributions& contributions) {
  const auto own_rank = static_cast<std::size_t>(axis.ranks.rank());
  std::vector<std::int64_t> in_counts(axis.counts.size(), 0);
  if (contributions[own_rank]) in_counts = axis.counts;
  std::vector<std::int64_t> out_counts;
  // The leaves were rounded to the reduce dtype, sums are not: what holds one goes as it is.
  const bool has_leaves_only = std::all_of(contributions.begin(), contributions.end(), [&](const auto& node) {
    return !node || num_leaves_under(*node, schedule_->num_micro_batches()) == 1;
  });
  const at::ScalarType dtype = has_leaves_only ? context_.reduce_dtype : at::kFloat;
  Exchange exchange{.work = {}, .out = {}, .nodes = {}, .into = &into, .num_bytes = 0};
  for (const auto& node : contributions) {
    out_counts.push_back(node ? axis.counts[own_rank] : 0);
    if (node) exchange.nodes.push_back(*node);
  }
  const at::Tensor in = packed.defined() ? packed.to(dtype) : at::empty({0}, dtype);
  exchange.out = at::empty({std::accumulate(out_counts.begin(), out_counts.end(), std::int64_t{0})}, dtype);
  exchange.num_bytes = static_cast<std::int64_t>(in.nbytes() + exchange.out.nbytes());
  context_.memory.gradients.add(exchange.num_bytes);
  exchange.work = axis.ranks.all_to_all(exchange.out, out_counts, in, in_counts);
  sums.exchanges.push_back(std::move(exchange));
}

void TreeReducer::issue_subtrees(UnitSums& sums, TreeAccumulator& from, TreeAccumulator& into, const Axis& axis) {
  std::vector<std::vector<TreeNode>> nodes;  // of every rank
  std::size_t num_exchanges = 0;
  for (const auto& [begin, end] : axis.ranges) {
    nodes.push_back(covering_nodes(begin, end, schedule_->num_micro_batches()));
    num_exchanges = std::max(num_exchanges, nodes.back().size());
  }
  const std::vector<TreeAccumulator::Entry> own = from.take_nodes();
  const std::vector<TreeNode>& expected = nodes[static_cast<std::size_t>(axis.ranks.rank())];
  check_internal(own.size() == expected.size(), "TreeReducer: a micro-batch of this rank is missing");
  for (std::size_t i = 0; i < num_exchanges; ++i) {
    Contributions contributions;
    for (const auto& of_rank : nodes)
      contributions.push_back(i < of_rank.size() ? std::optional(of_rank[i]) : std::nullopt);
    check_internal(i >= own.size() || own[i].first == expected[i], "TreeReducer: unexpected partial sum");
    issue(sums, into, axis, i < own.size() ? own[i].second : at::Tensor(), contributions);
  }
}

void TreeReducer::merge(UnitSums& sums) {
  for (Exchange& exchange : sums.exchanges) {
    exchange.work.wait();
    const auto num_nodes = static_cast<std::int64_t>(exchange.nodes.size());
    const std::int64_t count = num_nodes == 0 ? 0 : exchange.out.numel() / num_nodes;
    for (std::int64_t i = 0; i < num_nodes; ++i)
      exchange.into->add(exchange.nodes[static_cast<std::size_t>(i)],
                         exchange.out.narrow(0, i * count, count).to(at::kFloat));
    context_.memory.gradients.subtract(exchange.num_bytes);
    exchange.out.reset();
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
          issue_subtrees(unit_sums, unit_sums.local, unit_sums.shard, shard_axis(unit));
        if (!unit_sums.exchanges.empty()) return true;
        break;
      case 1:
        merge(unit_sums);
        if (!has_replicas) break;
        issue_subtrees(unit_sums, unit_sums.shard, unit_sums.owned, replica_axis(unit));
        return true;
      case 2:
        merge(unit_sums);
        unit.begin_gradients((has_replicas ? unit_sums.owned : unit_sums.shard).take_root());
        if (has_replicas) return true;
        break;
      default:
        unit.finish_gradients();
        sums_.erase(&unit);
        return false;
    }
  }
}

void TreeReducer::finish(ShardUnit& unit) {
  const std::deque<ShardUnit*> earlier = std::exchange(finishing_, {});
  const bool is_under_way = advance(unit);
  for (ShardUnit* other : earlier) {
    if (advance(*other)) finishing_.push_back(other);
  }
  if (is_under_way) finishing_.push_back(&unit);
  count_partials();
}

void TreeReducer::finish_all() {
  while (!finishing_.empty()) {
    ShardUnit* const unit = finishing_.front();
    finishing_.pop_front();
    if (advance(*unit)) finishing_.push_back(unit);
  }
  count_partials();
}

void TreeReducer::count_partials() {
  std::int64_t bytes = 0;
  for (const auto& [unit, unit_sums] : sums_) {
    bytes += unit_sums.local.num_bytes() + unit_sums.shard.num_bytes() + unit_sums.owned.num_bytes();
  }
  context_.memory.partial_sums.set(bytes);
}

}  // namespace shardtune
