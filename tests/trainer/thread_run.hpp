#pragma once
// Whole training runs on thread ranks.
#include <functional>
#include <string>

#include "tests/parallel/wrapping_communicator.hpp"
#include "trainer/options.hpp"

namespace shardtune::testing_support {

// What a test hangs into a rank's communication; see wrapping_communicator.hpp.
using MakeHooks = std::function<toy::CommunicatorHooks(int rank)>;

// Trains on `num_ranks` threads with one thread each, silently, and returns the SHA-256 of the exported weights.
std::string train_on_threads(const RunOptions& options, int num_ranks, const MakeHooks& make_hooks = {});

}  // namespace shardtune::testing_support
