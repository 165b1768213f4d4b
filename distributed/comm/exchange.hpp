#pragma once
// Small host-side values between ranks, on top of a Communicator's tensors. Collective; blocks.
#include <string>
#include <vector>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

// Every rank's text, in rank order, on every rank.
std::vector<std::string> all_gather_strings(Communicator& communicator, const std::string& text);
// Root's text on every rank; other ranks' argument is ignored.
std::string broadcast_string(Communicator& communicator, const std::string& text, int root);

}  // namespace shardtune
