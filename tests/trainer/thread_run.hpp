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

// Continues a copy of the directory of a finished run from its checkpoint of `step`; the copy is removed again. Returns
// the SHA-256 of the weights that come out.
std::string resume_on_threads(RunOptions options, int num_ranks, std::int64_t step);

}  // namespace shardtune::testing_support
