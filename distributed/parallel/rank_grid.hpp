#pragma once
// The ranks of a plan as a grid, shards x replicas: the ranks of one replica hold one copy of the master weights
// between them, the ranks of one shard hold the same piece. ddp is 1 x N, zero1 to zero3 are N x 1.
//
// Note [Ranks in the order of their slices]
// A parameter is cut into one distinct slice per rank. The pieces of a shard's replicas must be neighbours, so that the
// shard is contiguous; replicas, on the other hand, lie within nodes, where ranks are neighbours. Inside of
// distributed/parallel ranks are therefore those of world(), numbered shard * num_replicas + replica, which is the
// job's numbering except under hsdp.
#include <memory>

#include "distributed/comm/communicator.hpp"
#include "distributed/comm/process_mesh.hpp"
#include "distributed/parallel/sharding_plan.hpp"

namespace shardtune {

class RankGrid {
 public:
  // Collective. `world` (all ranks of the job) must outlive this. shard_size: ranks per replica, for hsdp only;
  // Error{config} when it is not positive or does not divide the number of ranks.
  RankGrid(Communicator& world, const ShardingPlan& plan, int shard_size);

  Communicator& world() const noexcept { return *world_; }
  Communicator& shards() const noexcept { return *shards_; }      // of this rank's replica, by shard
  Communicator& replicas() const noexcept { return *replicas_; }  // of this rank's shard, by replica
  int num_shards() const noexcept { return shards_->size(); }
  int num_replicas() const noexcept { return replicas_->size(); }
  int shard() const noexcept { return shards_->rank(); }
  int replica() const noexcept { return replicas_->rank(); }

 private:
  std::unique_ptr<Communicator> reordered_world_;
  std::unique_ptr<ProcessMesh> mesh_;
  std::unique_ptr<Communicator> self_;
  Communicator* world_;
  Communicator* shards_;
  Communicator* replicas_;
};

// The shard size of hsdp when the user gives none: the ranks of a node. Collective. Error{config} when nodes hold
// different numbers of ranks or the ranks of a node are not numbered one after another. host: this rank's.
int ranks_per_node(Communicator& world, const std::string& host);

}  // namespace shardtune
