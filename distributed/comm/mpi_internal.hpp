#pragma once
// Test seam of the MPI backend. Internal to distributed/comm and its tests.
#include <cstdint>
#include <memory>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

// Collective: a group of the same ranks that hands at most `max_bytes_per_call` (> 0) bytes to one MPI call, so that
// chunking can be tested without gigabytes. `communicator` comes from MpiEnvironment::world() or its split();
// Error{internal} otherwise. A group of one rank is a Self communicator and has nothing to cut.
std::unique_ptr<Communicator> split_with_chunk_limit(Communicator& communicator, std::int64_t max_bytes_per_call);

}  // namespace shardtune
