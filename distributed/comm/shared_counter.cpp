#include "distributed/comm/shared_counter.hpp"

#include <climits>

#include <linux/futex.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace shardtune {
namespace {

static_assert(std::atomic<std::uint32_t>::is_always_lock_free, "counters are shared between processes");

// Where ranks outnumber cores, giving way is how the awaited one gets to run; more often than this only burns time.
constexpr int kNumYields = 8;

void pause() noexcept {
#if defined(__x86_64__)
  _mm_pause();
#endif
}

bool is_reached(std::uint32_t now, std::uint32_t value) { return static_cast<std::int32_t>(now - value) >= 0; }

}  // namespace

void SharedCounter::publish(std::uint32_t value) noexcept {
  // Sequentially consistent against num_sleepers_: either this rank sees the sleeper or the sleeper sees the value.
  value_.store(value, std::memory_order_seq_cst);
  if (num_sleepers_.load(std::memory_order_seq_cst) == 0) return;
  (void)::syscall(SYS_futex, &value_, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
}

bool SharedCounter::wait_for(std::uint32_t value, const WaitPolicy& policy) noexcept {
  for (int i = 0; i <= policy.num_spins; ++i) {
    if (is_reached(value_.load(std::memory_order_acquire), value)) return true;
    pause();
  }
  for (int i = 0; i < kNumYields; ++i) {
    (void)::sched_yield();
    if (is_reached(value_.load(std::memory_order_acquire), value)) return true;
  }
  const auto deadline = std::chrono::steady_clock::now() + policy.timeout;
  num_sleepers_.fetch_add(1, std::memory_order_seq_cst);
  bool is_done = false;
  for (;;) {
    const std::uint32_t now = value_.load(std::memory_order_seq_cst);
    is_done = is_reached(now, value);
    const auto left = std::chrono::duration_cast<std::chrono::nanoseconds>(deadline - std::chrono::steady_clock::now());
    if (is_done || left.count() <= 0) break;
    const timespec time{static_cast<time_t>(left.count() / 1'000'000'000),
                        static_cast<long>(left.count() % 1'000'000'000)};
    // Returns at once when the value has changed; a wake-up without a reason goes round again.
    (void)::syscall(SYS_futex, &value_, FUTEX_WAIT, now, &time, nullptr, 0);
  }
  num_sleepers_.fetch_sub(1, std::memory_order_seq_cst);
  return is_done;
}

}  // namespace shardtune
