#pragma once
// Test seams: groups that communicate in a chosen way. Internal to distributed/comm, its tests and benchmarks.
#include <cstdint>
#include <memory>
#include <string>

#include "distributed/comm/communicator.hpp"
#include "distributed/comm/layered_transport.hpp"

namespace shardtune {

// Collective: a group of the same ranks in the same order, which sends messages of at most `max_bytes_per_call` (> 0)
// to MPI, so that chunking can be tested without gigabytes. Error{internal} when `communicator` is not over MPI. Of a
// rank alone both functions make a Self communicator.
std::unique_ptr<Communicator> split_with_chunk_limit(Communicator& communicator, std::int64_t max_bytes_per_call);

// Collective: a group of the same ranks in the same order, layered as `options` say. Works over thread ranks as well.
std::unique_ptr<Communicator> split_layered(Communicator& communicator, const LayerOptions& options);

// What moves the bytes of a group with several ranks, to be called on the calling thread while no operation runs. Null
// for a rank alone.
Transport* transport_of(const Communicator& communicator);
// "shared memory", "MPI", ...; "self" for a rank alone.
std::string describe_transport(const Communicator& communicator);

}  // namespace shardtune
