#pragma once
// Sums gradients in the order that costs least: no partial sums of a tree, plain reductions.
//   plans that reduce once (ddp, zero1): autograd adds the micro-batches of a rank up in .grad, then one reduction a
//   step; plans that reduce every micro-batch (zero2, zero3, hsdp): one reduction over the shards a round, added up in
//   one shard-sized buffer; under hsdp then one over the replicas a step.
// The order, and with it the last bits, follows from the plan and the numbers of ranks and micro-batches alone:
// Communicator adds in a fixed order. Whatever travels is in the reduce dtype.
#include <cstdint>
#include <map>
#include <memory>
#include <vector>

#include "distributed/parallel/gradient_reducer.hpp"

namespace shardtune {

class FastReducer : public GradientReducer {
 public:
  FastReducer(const ShardContext& context, GradientProbe probe);

  void add(ShardUnit& unit, std::int64_t round) override;

 protected:
  bool start_over_shards(ShardUnit& unit) override;
  bool start_over_replicas(ShardUnit& unit) override;
  Result take_result(ShardUnit& unit) override;
  void merge_received(ShardUnit& unit) override;
  void forget_sums() override { sums_.clear(); }
  void count_partials() override;

 private:
  struct UnitSum {
    Pieces whole;    // of this rank's micro-batches, where it has no shards
    at::Tensor sum;  // fp32: of this rank's shard
    // A reduction under way and what comes out of it.
    std::unique_ptr<BucketStream> stream;
    at::Tensor out;
    std::int64_t held_bytes = 0;  // in .grad between micro-batches
  };

  // Empty gradients count as zero.
  void issue_over_shards(ShardUnit& unit, UnitSum& unit_sum, const Pieces& gradients);
  Pieces take_sum(ShardUnit& unit);  // nothing is kept of the unit

  std::map<const ShardUnit*, UnitSum> sums_;  // looked up by unit only, never iterated for order
};

}  // namespace shardtune
