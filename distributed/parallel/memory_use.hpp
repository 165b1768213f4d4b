#pragma once
// What the parallel engine holds, in bytes, for --log_memory. Activations and optimizer state are not its business.
#include <algorithm>
#include <cstdint>

namespace shardtune {

// A count that remembers its peak. Not thread-safe.
class ByteCounter {
 public:
  void add(std::int64_t bytes) noexcept {
    current_ += bytes;
    peak_ = std::max(peak_, current_);
  }
  void subtract(std::int64_t bytes) noexcept { current_ -= bytes; }
  void set(std::int64_t bytes) noexcept { add(bytes - current_); }
  std::int64_t current() const noexcept { return current_; }
  std::int64_t peak() const noexcept { return peak_; }
  void reset_peak() noexcept { peak_ = current_; }

 private:
  std::int64_t current_ = 0;
  std::int64_t peak_ = 0;
};

struct MemoryUse {
  ByteCounter masters;       // fp32 master weights
  ByteCounter compute;       // compute copies of this rank alone that are not aliases of masters
  ByteCounter gradients;     // finished gradients
  ByteCounter partial_sums;  // of the canonical tree, and what is on its way into them
  ByteCounter buffers;       // EngineBuffers; of what ranks have in common this rank's share
};

}  // namespace shardtune
