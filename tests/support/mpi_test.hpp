#pragma once
// For tests registered with RANKS: the ranks mpirun has started.
#include "distributed/comm/communicator.hpp"

namespace shardtune {

// All ranks of the job. Every test of the binary runs on every rank in the same order, so its collectives match.
// Operations are compared across ranks before they run (SHARDTUNE_CHECK_COLLECTIVES, unless the caller set it): a rank
// that leaves a test early turns into an error on all ranks, not into a hang.
Communicator& mpi_world();

}  // namespace shardtune
