#pragma once
// Subcommands of one process without MPI. Results go to --output or standard output; each returns the exit code or throws
// Error.
#include "launcher/command_line.hpp"

namespace shardtune {

int run_tokenize(const Invocation& invocation);
// `list` and `verify` print text, `inspect` prints JSON. 0; 3 when `verify` finds a damaged checkpoint or there is none.
int run_checkpoint(const Invocation& invocation);

}  // namespace shardtune
