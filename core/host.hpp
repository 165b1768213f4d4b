#pragma once
// The machine this process runs on. Thread-safe.
#include <string>

namespace shardtune {

// As gethostname gives it; empty when the system does not tell.
std::string host_name();

}  // namespace shardtune
