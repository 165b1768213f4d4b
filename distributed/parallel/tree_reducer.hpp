#pragma once
// Sums the gradients of a step's micro-batches over ranks in the canonical tree (tree_accumulator.hpp), so that the
// result has the same bits for any number of ranks and any plan. Slices travel to their owners by all_to_all; the owner
// merges siblings.
//   plans that reduce every micro-batch: each round's leaves go to the owners at once, which keep shard-sized partials;
//   plans that reduce once: a rank sums its contiguous range of micro-batches into aligned subtrees, exchanged at the
//   end.
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "distributed/parallel/shard_unit.hpp"
#include "distributed/parallel/tree_accumulator.hpp"

namespace shardtune {

// Which micro-batch a rank has in which round. Pure functions of (plan, number of ranks, V).
class RoundSchedule {
 public:
  RoundSchedule(const ShardingPlan& plan, int num_ranks, std::int64_t num_micro_batches);  // Error{internal} for V < 1

  std::int64_t num_micro_batches() const noexcept { return num_micro_batches_; }
  std::int64_t num_rounds() const noexcept;  // ceil(V / ranks) under every plan
  // -1: this rank has none in this round.
  std::int64_t micro_batch(int rank, std::int64_t round) const noexcept;
  // Reduce-once plans: rank r has the contiguous range [r * V / N, (r + 1) * V / N).
  std::pair<std::int64_t, std::int64_t> range(int rank) const noexcept;

 private:
  bool is_dealt_per_round_;
  std::int64_t num_ranks_;
  std::int64_t num_micro_batches_;
};

// Test seam: sees (and may spoil) what leaves this rank for the owners.
using GradientProbe = std::function<void(const std::string& unit_name, at::Tensor packed)>;

// Not thread-safe.
class TreeReducer {
 public:
  TreeReducer(const ShardContext& context, GradientProbe probe);

  // Local. Forgets everything of an earlier step.
  void begin_step(const RoundSchedule& schedule);
  // Takes the unit's .grad as the leaf of this rank's micro-batch in `round`; a rank without one contributes nothing
  // and its .grad is discarded. Collective when the plan reduces every micro-batch: every rank calls it for every unit
  // with trainable parameters, in the same order, once per round.
  void add(ShardUnit& unit, std::int64_t round);
  // Collective, once per unit after the last round, in the same order on all ranks: sets ShardedParameter::gradient.
  void finish(ShardUnit& unit);

 private:
  struct UnitSums {
    TreeAccumulator local;  // reduce-once plans: this rank's range, packed for all owners
    TreeAccumulator owned;  // this rank's slices
  };
  using Contributions = std::vector<std::optional<TreeNode>>;  // per rank: which node it sends now, if any

  UnitSums& sums(ShardUnit& unit);
  // Collective. `packed` is undefined exactly where contributions[own rank] is empty.
  void exchange(ShardUnit& unit, const at::Tensor& packed, const Contributions& contributions);
  void count_partials();

  ShardContext context_;
  GradientProbe probe_;
  std::optional<RoundSchedule> schedule_;
  std::map<const ShardUnit*, UnitSums> sums_;  // looked up by unit only, never iterated for order
};

}  // namespace shardtune
