#include "distributed/parallel/tree_reducer.hpp"

#include <algorithm>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include "core/error.hpp"

namespace shardtune {

RoundSchedule::RoundSchedule(const ShardingPlan& plan, int num_ranks, std::int64_t num_micro_batches)
    : is_dealt_per_round_(plan.reduce_every_microbatch), num_ranks_(num_ranks), num_micro_batches_(num_micro_batches) {
  check_internal(num_micro_batches >= 1, "RoundSchedule: a step needs at least one micro-batch");
}

std::int64_t RoundSchedule::num_rounds() const noexcept { return (num_micro_batches_ + num_ranks_ - 1) / num_ranks_; }

std::pair<std::int64_t, std::int64_t> RoundSchedule::range(int rank) const noexcept {
  return {rank * num_micro_batches_ / num_ranks_, (rank + 1) * num_micro_batches_ / num_ranks_};
}

std::int64_t RoundSchedule::micro_batch(int rank, std::int64_t round) const noexcept {
  if (is_dealt_per_round_) {
    const std::int64_t index = round * num_ranks_ + rank;
    return index < num_micro_batches_ ? index : -1;
  }
  const auto [begin, end] = range(rank);
  return begin + round < end ? begin + round : -1;
}

TreeReducer::TreeReducer(const ShardContext& context, GradientProbe probe)
    : context_(context), probe_(std::move(probe)) {}

void TreeReducer::begin_step(const RoundSchedule& schedule) {
  schedule_ = schedule;
  sums_.clear();
  count_partials();
}

TreeReducer::UnitSums& TreeReducer::sums(ShardUnit& unit) {
  check_internal(schedule_.has_value(), "TreeReducer: no step has begun");
  const std::int64_t leaves = schedule_->num_micro_batches();
  return sums_.try_emplace(&unit, UnitSums{TreeAccumulator(leaves), TreeAccumulator(leaves)}).first->second;
}

void TreeReducer::add(ShardUnit& unit, std::int64_t round) {
  UnitSums& unit_sums = sums(unit);
  const std::int64_t own_index = schedule_->micro_batch(context_.world.rank(), round);
  at::Tensor packed;
  if (own_index >= 0) {
    packed = unit.pack_gradients();
    if (probe_) probe_(unit.unit().name, packed);
  } else {
    unit.drop_gradients();
  }
  const auto packed_bytes = packed.defined() ? static_cast<std::int64_t>(packed.nbytes()) : 0;
  context_.memory.gradients.add(packed_bytes);
  if (context_.plan.reduce_every_microbatch) {
    Contributions contributions;
    for (int rank = 0; rank < context_.world.size(); ++rank) {
      const std::int64_t index = schedule_->micro_batch(rank, round);
      contributions.push_back(index >= 0 ? std::optional(TreeNode{0, index}) : std::nullopt);
    }
    exchange(unit, packed, contributions);
  } else if (own_index >= 0) {
    unit_sums.local.add({0, own_index}, std::move(packed));
  }
  context_.memory.gradients.subtract(packed_bytes);
  count_partials();
}

void TreeReducer::exchange(ShardUnit& unit, const at::Tensor& packed, const Contributions& contributions) {
  const std::vector<std::int64_t>& counts = unit.packed_counts();
  const auto own_rank = static_cast<std::size_t>(context_.world.rank());
  const std::int64_t own_count = counts[own_rank];
  std::vector<std::int64_t> in_counts(counts.size(), 0);
  if (contributions[own_rank]) in_counts = counts;
  std::vector<std::int64_t> out_counts;
  std::int64_t received = 0;
  for (const auto& node : contributions) {
    out_counts.push_back(node ? own_count : 0);
    received += out_counts.back();
  }
  const at::Tensor in = packed.defined() ? packed : at::empty({0}, at::kFloat);
  const at::Tensor out = at::empty({received}, at::kFloat);
  context_.memory.gradients.add(static_cast<std::int64_t>(out.nbytes()));
  context_.world.all_to_all(out, out_counts, in, in_counts).wait();
  TreeAccumulator& owned = sums(unit).owned;
  std::int64_t at_element = 0;
  for (const auto& node : contributions) {
    if (!node) continue;
    owned.add(*node, out.narrow(0, at_element, own_count));
    at_element += own_count;
  }
  context_.memory.gradients.subtract(static_cast<std::int64_t>(out.nbytes()));
}

void TreeReducer::finish(ShardUnit& unit) {
  UnitSums& unit_sums = sums(unit);
  if (!context_.plan.reduce_every_microbatch) {
    std::vector<std::vector<TreeNode>> nodes;  // of every rank
    std::size_t num_exchanges = 0;
    for (int rank = 0; rank < context_.world.size(); ++rank) {
      const auto [begin, end] = schedule_->range(rank);
      nodes.push_back(covering_nodes(begin, end, schedule_->num_micro_batches()));
      num_exchanges = std::max(num_exchanges, nodes.back().size());
    }
    std::vector<TreeAccumulator::Entry> own = unit_sums.local.take_nodes();
    const std::vector<TreeNode>& expected = nodes[static_cast<std::size_t>(context_.world.rank())];
    check_internal(own.size() == expected.size(), "TreeReducer: a micro-batch of this rank is missing");
    for (std::size_t i = 0; i < num_exchanges; ++i) {
      Contributions contributions;
      for (const auto& of_rank : nodes)
        contributions.push_back(i < of_rank.size() ? std::optional(of_rank[i]) : std::nullopt);
      check_internal(i >= own.size() || own[i].first == expected[i], "TreeReducer: unexpected partial sum");
      exchange(unit, i < own.size() ? own[i].second : at::Tensor(), contributions);
      if (i < own.size()) own[i].second.reset();
      count_partials();
    }
  }
  at::Tensor finished = unit_sums.owned.take_root();
  sums_.erase(&unit);
  count_partials();
  unit.set_gradients(finished);
}

void TreeReducer::count_partials() {
  std::int64_t bytes = 0;
  for (const auto& [unit, unit_sums] : sums_) bytes += unit_sums.local.num_bytes() + unit_sums.owned.num_bytes();
  context_.memory.partial_sums.set(bytes);
}

}  // namespace shardtune
