#pragma once
// How malloc treats this process; the program and what measures its parts are to have the same.

namespace shardtune {

// Keeps freed memory for reuse instead of returning it to the system. Call once, first thing in main.
void tune_allocator();

}  // namespace shardtune
