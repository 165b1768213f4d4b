#pragma once
// What environment variables say about communication. docs/collectives.md describes them. Internal to distributed/comm.
#include <chrono>
#include <cstdint>

#include "distributed/comm/layered_transport.hpp"
#include "distributed/comm/transport.hpp"

namespace shardtune {

struct EnvironmentSettings {
  bool check_collectives = false;                      // SHARDTUNE_CHECK_COLLECTIVES = 0 | 1
  SharedMemoryUse use = SharedMemoryUse::if_possible;  // SHARDTUNE_COMM = auto | shm | mpi
  std::chrono::seconds timeout{0};                     // SHARDTUNE_COMM_TIMEOUT, 0: not set
  int ranks_per_node = 0;                              // SHARDTUNE_RANKS_PER_NODE (tests), 0: what the machines are
};

// Error{config} naming variable and value.
EnvironmentSettings read_environment_settings();

// Collective. A variable may reach some hosts only, so that all ranks take the strictest of each: mpi before shm before
// auto, the longest timeout, checks if anyone wants them.
EnvironmentSettings agree(Transport& transport, const EnvironmentSettings& mine);

}  // namespace shardtune
