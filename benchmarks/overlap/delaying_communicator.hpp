#pragma once
// A Communicator whose operations take bytes / rate longer, on a thread that sleeps meanwhile.
#include <atomic>
#include <cstdint>
#include <memory>

#include "distributed/comm/communicator.hpp"

namespace shardtune::benchmark {

// What one rank's operations were made to wait. Thread-safe.
struct Delay {
  std::atomic<double> bytes_per_second = 0.0;  // 0: none
  std::atomic<std::int64_t> injected_ns = 0;
  std::atomic<std::int64_t> num_bytes = 0;
};

// `inner` and `delay` outlive it; `inner` must be used through it only. All operations of all its splits run on one
// thread in the order of their issue, as in an MPI process. has_shared_memory: whether make_shared() gives what `inner`
// has (false: nothing, as between machines).
std::unique_ptr<Communicator> make_delaying_communicator(Communicator& inner, Delay& delay, bool has_shared_memory);

}  // namespace shardtune::benchmark
