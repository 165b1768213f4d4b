#include "distributed/parallel/rank_grid.hpp"

#include <algorithm>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "core/error.hpp"
#include "distributed/comm/exchange.hpp"

namespace shardtune {

RankGrid::RankGrid(Communicator& world, const ShardingPlan& plan, int shard_size) : world_(&world) {
  if (plan.shard_axis == MeshAxis::node) {
    const int num_ranks = world.size();
    if (shard_size < 1 || num_ranks % shard_size != 0) {
      fail(ErrorKind::config, fmt::format("--hsdp_shard_size = {} does not divide the {} ranks of the job; choose a "
                                          "divisor, usually the ranks of a node",
                                          shard_size, num_ranks));
    }
    const int num_replicas = num_ranks / shard_size;
    const int shard = world.rank() % shard_size;
    const int replica = world.rank() / shard_size;
    reordered_world_ = world.split(0, shard * num_replicas + replica);
    world_ = reordered_world_.get();
    mesh_ = std::make_unique<ProcessMesh>(
        *world_, std::vector<ProcessMesh::Axis>{{"dp_shard", shard_size}, {"dp_replicate", num_replicas}});
    shards_ = &mesh_->axis("dp_shard");
    replicas_ = &mesh_->axis("dp_replicate");
    return;
  }
  self_ = make_self_communicator();
  const bool is_sharded = plan.shard_axis == MeshAxis::world;
  shards_ = is_sharded ? world_ : self_.get();
  replicas_ = is_sharded ? self_.get() : world_;
}

int ranks_per_node(Communicator& world, const std::string& host) {
  const std::vector<std::string> hosts = all_gather_strings(world, host);
  const auto size = static_cast<std::size_t>(std::count(hosts.begin(), hosts.end(), hosts.front()));
  for (std::size_t rank = 0; rank < hosts.size(); ++rank) {
    const auto on_host = static_cast<std::size_t>(std::count(hosts.begin(), hosts.end(), hosts[rank]));
    if (on_host == size && hosts[rank] == hosts[rank - rank % size]) continue;
    fail(ErrorKind::config, fmt::format("--sharding hsdp cannot tell its shard size: rank {} of host {} breaks the "
                                        "pattern of {} neighbouring ranks per host; give --hsdp_shard_size, or start "
                                        "as many ranks on every host, host by host",
                                        rank, hosts[rank], size));
  }
  return static_cast<int>(size);
}

}  // namespace shardtune
