#pragma once
// How much memory the process and its tensors take. Thread-safe.
#include <cstdint>

namespace shardtune {

// Resident set now and its peak since the process started, from /proc/self/status; 0 where that does not exist.
std::int64_t resident_bytes();
std::int64_t peak_resident_bytes();

// Pages that the system has handed to this process for the first time, or again, since it started: each costs a visit
// to the kernel.
std::int64_t page_faults();

// Counts every byte that tensors hold: wraps LibTorch's CPU allocator. Call once, from main, before the first tensor.
void install_tensor_memory_counter();
std::int64_t tensor_bytes();       // held now; 0 when not installed
std::int64_t peak_tensor_bytes();  // most held at once since the last reset
void reset_peak_tensor_bytes();

}  // namespace shardtune
