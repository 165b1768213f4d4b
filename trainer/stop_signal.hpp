#pragma once
// A request to stop with a checkpoint: SIGTERM, SIGINT or SIGUSR1 to any rank. The training loop polls it once a step.

namespace shardtune {

// Call once from main. A second SIGINT ends the process at once. SIGXFSZ is ignored: writing past a file size limit is an
// error like a full disk. Children of the process inherit nothing.
void install_stop_handlers();

// Gives the signals their ordinary effect again: for a process that is only waiting to be ended.
void remove_stop_handlers() noexcept;

// Whether a signal came. Async-signal-safe and thread-safe.
bool stop_requested() noexcept;

}  // namespace shardtune
