#pragma once
// Which micro-batch a rank has in which round. A pure function of (plan, grid, V). Ranks are those of
// RankGrid::world(). Every replica has a contiguous range of micro-batches, so that its sums are few aligned subtrees.
// Within a replica plans that reduce every micro-batch deal each round to neighbouring shards (their sums are merged at
// once); plans that reduce once give each shard a contiguous range again.
#include <cstdint>
#include <utility>

#include "distributed/parallel/sharding_plan.hpp"

namespace shardtune {

class RoundSchedule {
 public:
  using Range = std::pair<std::int64_t, std::int64_t>;  // begin, end
  struct Shape {
    int num_shards;
    int num_replicas;
  };

  RoundSchedule(const ShardingPlan& plan, Shape shape, std::int64_t num_micro_batches);  // Error{internal} for V < 1

  std::int64_t num_micro_batches() const noexcept { return num_micro_batches_; }
  std::int64_t num_rounds() const noexcept;  // ceil(V / ranks) under every plan
  // -1: this rank has none in this round.
  std::int64_t micro_batch(int rank, std::int64_t round) const noexcept;
  Range range_of_replica(int replica) const noexcept;
  // Reduce-once plans: what a shard of a replica computes.
  Range range(int shard, int replica) const noexcept;

 private:
  bool is_dealt_per_round_;
  Shape shape_;
  std::int64_t num_micro_batches_;
};

}  // namespace shardtune
