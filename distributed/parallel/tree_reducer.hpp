#pragma once
// Sums the gradients of a step's micro-batches over ranks in the canonical tree (tree_accumulator.hpp), so that the
// result has the same bits for any number of ranks and any plan. Slices travel to their owners in a TreeExchange; the
// owner merges siblings. What a rank sums on its own stays where autograd left it.
//   over the shards of a replica: plans that reduce every micro-batch send each round's leaves at once and keep
//     shard-sized partial sums; plans that reduce once send the aligned subtrees of a rank's range after its last one;
//   over the replicas of a shard: the aligned subtrees of each replica's range, once a step; then every replica gathers
//     the finished slices of its shard. Where each replica has one subtree of the same height, an all_reduce does both.
// An axis of size one needs no exchange. Communication is issued and waited for later, see finish().
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "distributed/parallel/gradient_reducer.hpp"
#include "distributed/parallel/tree_accumulator.hpp"
#include "distributed/parallel/tree_exchange.hpp"

namespace shardtune {

class TreeReducer : public GradientReducer {
 public:
  TreeReducer(const ShardContext& context, GradientProbe probe);

  void add(ShardUnit& unit, std::int64_t round) override;

 protected:
  bool start_over_shards(ShardUnit& unit) override;
  bool start_over_replicas(ShardUnit& unit) override;
  Result take_result(ShardUnit& unit) override;
  void merge_received(ShardUnit& unit) override;
  void forget_sums() override { sums_.clear(); }
  void count_partials() override;

 private:
  struct Exchange {
    std::unique_ptr<TreeExchange> exchange;
    TreeAccumulator* into;
  };
  // Sums that a rank makes on its own are whole gradients, one tensor per parameter; what it received is one tensor,
  // its part of the packed layout.
  struct UnitSums {
    explicit UnitSums(std::int64_t leaves) : local(leaves), shard(leaves), owned(leaves) {}
    TreeAccumulator local;  // reduce-once plans with several shards: this rank's range, whole
    TreeAccumulator shard;  // this rank's shard (whole where there is one), over the replica's micro-batches
    TreeAccumulator owned;  // this rank's slice, over all micro-batches
    std::vector<Exchange> exchanges;
    Pieces spare;  // whole gradients that were sent, see ShardUnit::begin_gradients
  };
  using Contributions = std::vector<std::optional<TreeNode>>;  // per rank of an axis: the node it sends, if any
  struct Axis {
    ReductionAxis ranks;
    std::vector<RoundSchedule::Range> ranges;
  };

  UnitSums& sums(ShardUnit& unit);
  Axis shard_axis(const ShardUnit& unit) const;
  Axis replica_axis(const ShardUnit& unit) const;
  // `parts` is empty exactly where contributions[own rank] is.
  void issue(UnitSums& sums, TreeAccumulator& into, const Axis& axis, std::vector<Pieces> parts,
             const Contributions& contributions);
  // What this rank has for each rank of the axis in one of its sums.
  using Cut = std::function<std::vector<Pieces>(const Pieces& sum)>;
  void issue_subtrees(UnitSums& sums, TreeAccumulator& from, TreeAccumulator& into, const Axis& axis, const Cut& cut);
  void round_leaves(const Pieces& gradients) const;
  // An all_reduce adds up what the replicas have in the order of the tree, and nothing was to travel rounded.
  bool is_all_reduce(const Axis& replicas) const;

  std::map<const ShardUnit*, UnitSums> sums_;  // looked up by unit only, never iterated for order
};

}  // namespace shardtune
