#pragma once
// Sums gradients in the order that costs least: no partial sums of a tree, plain reductions.
//   plans that reduce once (ddp, zero1): autograd adds the micro-batches of a rank up in .grad, then one reduction a
//   step; plans that reduce every micro-batch (zero2, zero3, hsdp): one reduction over the shards a round, added up in
//   one
//     shard-sized buffer; under hsdp then one over the replicas a step.
// The order, and with it the last bits, follows from the plan and the numbers of ranks and micro-batches alone:
// Communicator adds in a fixed order. Whatever travels is in the reduce dtype.
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <vector>

#include "distributed/parallel/gradient_reducer.hpp"

namespace shardtune {

class FastReducer : public GradientReducer {
 public:
  FastReducer(const ShardContext& context, GradientProbe probe);

  void begin_step(const RoundSchedule& schedule) override;
  void add(ShardUnit& unit, std::int64_t round) override;

 protected:
  bool advance(ShardUnit& unit) override;
  void count_partials() override;

 private:
  struct UnitSum {
    Pieces whole;    // of this rank's micro-batches, before anything was sent
    at::Tensor sum;  // fp32: of this rank's shard; at last of its own slice
    // A reduction under way and what comes out of it.
    std::unique_ptr<BucketStream> stream;
    at::Tensor out;
    Pieces spare;                 // whole gradients that were sent, see ShardUnit::begin_gradients
    std::int64_t held_bytes = 0;  // in .grad between micro-batches
    int stage = 0;
  };
  struct Axis {
    Communicator& ranks;
    BucketPool& buckets;
    std::vector<std::int64_t> counts;  // elements that go to each rank
  };

  Pieces take(ShardUnit& unit, UnitSum& unit_sum);
  // parts: what this rank has for each rank of the axis; empty counts as zero.
  void issue(UnitSum& unit_sum, const Axis& axis, std::vector<Pieces> parts);
  void issue_over_shards(ShardUnit& unit, UnitSum& unit_sum, const Pieces& gradients);
  void issue_over_replicas(ShardUnit& unit, UnitSum& unit_sum);
  void merge(UnitSum& unit_sum);

  ShardContext context_;
  GradientProbe probe_;
  std::optional<RoundSchedule> schedule_;
  std::map<const ShardUnit*, UnitSum> sums_;  // looked up by unit only, never iterated for order
  UnitSum* under_way_ = nullptr;              // of the last add()
};

}  // namespace shardtune
