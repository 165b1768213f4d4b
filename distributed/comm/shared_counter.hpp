#pragma once
// A counter in shared memory that one rank raises and others wait for. Internal to distributed/comm.
#include <atomic>
#include <chrono>
#include <cstdint>

namespace shardtune {

// How a wait spends its time. Spinning pays only where the awaited rank runs on another core at that very moment.
struct WaitPolicy {
  int num_spins = 0;
  std::chrono::nanoseconds timeout = std::chrono::minutes(30);
};

// Zero-filled memory is a valid counter. Values wrap around; waiters and the counter are never 2^31 apart.
class alignas(128) SharedCounter {
 public:
  // Wakes all who wait for this value or less. What was written before is visible to them. One rank only.
  void publish(std::uint32_t value) noexcept;
  // Blocks until the counter is at `value` or beyond: spins, yields a few times, then sleeps in the kernel, so that a
  // wait for a rank that computes costs no processor time. False when the timeout passes first.
  bool wait_for(std::uint32_t value, const WaitPolicy& policy) noexcept;

 private:
  std::atomic<std::uint32_t> value_;
  std::atomic<std::uint32_t> num_sleepers_;
};

}  // namespace shardtune
