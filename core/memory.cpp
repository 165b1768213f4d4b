#include "core/memory.hpp"

#include <atomic>
#include <cstdlib>
#include <fstream>
#include <new>
#include <string>

#include <c10/core/CPUAllocator.h>
#include <sys/resource.h>

namespace shardtune {
namespace {

std::int64_t status_bytes(const char* field) {
  std::ifstream status("/proc/self/status");
  std::string key;
  while (status >> key) {
    std::int64_t kib = 0;
    if (key == field && status >> kib) return kib * 1024;
    status.ignore(1 << 16, '\n');
  }
  return 0;
}

std::atomic<std::int64_t> g_held{0}, g_peak{0};

// In front of the user's part, which is aligned to 64 bytes as LibTorch and same-bits sums need it.
struct Header {
  void* block;
  std::size_t bytes;
};
constexpr std::size_t kAlignment = 64;

void count(std::int64_t bytes) {
  const std::int64_t held = g_held.fetch_add(bytes) + bytes;
  std::int64_t peak = g_peak.load();
  while (held > peak && !g_peak.compare_exchange_weak(peak, held)) {
  }
}

Header* header_of(void* user) { return static_cast<Header*>(user) - 1; }

void release(void* user) {
  if (user == nullptr) return;
  count(-static_cast<std::int64_t>(header_of(user)->bytes));
  std::free(header_of(user)->block);
}

class CountingAllocator final : public at::Allocator {
 public:
  at::DataPtr allocate(std::size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, at::Device(at::kCPU)};
    // Not posix_memalign, which c10::alloc_cpu uses: before glibc 2.38 it asks the heap for more than it then keeps, so a
    // freed tensor's place never fits the next tensor of that size, and the heap grows by a third.
    void* block = std::malloc(bytes + sizeof(Header) + kAlignment);
    if (block == nullptr) throw std::bad_alloc();
    const auto first = reinterpret_cast<std::uintptr_t>(block) + sizeof(Header);
    auto* user = reinterpret_cast<void*>((first + kAlignment - 1) / kAlignment * kAlignment);
    *header_of(user) = {block, bytes};
    count(static_cast<std::int64_t>(bytes));
    return {user, user, &release, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* into, const void* from, std::size_t bytes) const override { default_copy_data(into, from, bytes); }
};

}  // namespace

std::int64_t resident_bytes() { return status_bytes("VmRSS:"); }
std::int64_t page_faults() {
  struct rusage usage {};
  ::getrusage(RUSAGE_SELF, &usage);
  return usage.ru_minflt + usage.ru_majflt;
}

std::int64_t peak_resident_bytes() { return status_bytes("VmHWM:"); }

void install_tensor_memory_counter() {
  // Leaked on purpose: tensors of static lifetime inside LibTorch may be freed after main.
  static auto* allocator = new CountingAllocator();
  c10::SetCPUAllocator(allocator, 1);
}

std::int64_t tensor_bytes() { return g_held.load(); }
std::int64_t peak_tensor_bytes() { return g_peak.load(); }
void reset_peak_tensor_bytes() { g_peak.store(g_held.load()); }

}  // namespace shardtune
