#pragma once
// Process-wide settings of the program.

namespace shardtune {

// Keeps freed memory for reuse instead of returning it to the system. Call once, first thing in main.
void tune_allocator();

}  // namespace shardtune
