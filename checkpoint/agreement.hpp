#pragma once
// Steps that all ranks of a job take together: either every rank succeeds or every rank throws the same Error.
#include <functional>
#include <string>
#include <vector>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

// Collective. Runs `step` here, shares the outcomes and throws on every rank the error of the lowest rank that failed:
// "<what> failed on rank R: <its message>". `step` must not communicate.
void run_agreed(Communicator& communicator, const std::string& what, const std::function<void()>& step);

// Collective. Every rank's text on `root`, in rank order; empty elsewhere.
std::vector<std::string> gather_strings(Communicator& communicator, const std::string& text, int root);

}  // namespace shardtune
