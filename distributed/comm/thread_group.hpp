#pragma once
// Ranks as threads of one process: fast multi-rank tests without a launcher.
#include <functional>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

// Runs body(communicator) on `num_ranks` new threads and joins them. at::set_num_threads-independent: each thread
// calls at::init_num_threads(). When a rank throws, the others' pending collectives end with Error{comm} and the
// first rank's own exception is rethrown here.
void run_thread_ranks(int num_ranks, const std::function<void(Communicator&)>& body);

}  // namespace shardtune
