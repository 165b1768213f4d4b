#pragma once
// Messages over MPI. All of it is called on the communication thread. Internal to distributed/comm and its tests.
#include <cstdint>
#include <memory>
#include <source_location>

#include "distributed/comm/transport.hpp"

namespace shardtune {

// Collective over all ranks. Counts above INT_MAX are chunked; MPI_ERRORS_RETURN is set.
std::unique_ptr<Transport> make_mpi_world_transport();

// Collective over all ranks: the same value on the ranks of one machine and on no other.
int first_rank_on_this_node();

// Test seam: at most this many bytes (> 0) per MPI call, so that chunking can be tested without gigabytes. Inherited by
// split(). Error{internal} when the transport is not over MPI.
void limit_bytes_per_call(Transport& transport, std::int64_t max_bytes);

// Error{comm} with MPI's text unless the call has succeeded.
void check_mpi(int code, const char* call, std::source_location where = std::source_location::current());

}  // namespace shardtune
