#pragma once
// All memory that a ParallelEngine communicates through. Made once, used by every unit in every step.
#include "distributed/parallel/bucket_pool.hpp"
#include "distributed/parallel/rank_grid.hpp"
#include "distributed/parallel/shared_copies.hpp"

namespace shardtune {

struct EngineBuffers {
  EngineBuffers(const RankGrid& grid, ByteCounter& counter)
      : shards(grid.shards(), counter), replicas(grid.replicas(), counter), copies(grid.shards(), counter) {}

  BucketPool shards;    // over RankGrid::shards()
  BucketPool replicas;  // over RankGrid::replicas()
  SharedCopies copies;  // of gathered weights, over RankGrid::shards()
  // Classes of `copies`, where the plan frees weights and the backend has such memory: of the root units and the
  // others.
  bool has_copies = false;
  int root_class = 0;
  int unit_class = 0;
};

}  // namespace shardtune
