#include "core/memory.hpp"

#include <atomic>
#include <fstream>
#include <string>

#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/alloc_cpu.h>

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

// The header keeps a 64-byte alignment of the user's part and remembers the size for the deleter.
constexpr std::size_t kHeader = 64;

void count(std::int64_t bytes) {
  const std::int64_t held = g_held.fetch_add(bytes) + bytes;
  std::int64_t peak = g_peak.load();
  while (held > peak && !g_peak.compare_exchange_weak(peak, held)) {
  }
}

void release(void* user) {
  if (user == nullptr) return;
  char* block = static_cast<char*>(user) - kHeader;
  count(-static_cast<std::int64_t>(*reinterpret_cast<std::size_t*>(block)));
  c10::free_cpu(block);
}

class CountingAllocator final : public at::Allocator {
 public:
  at::DataPtr allocate(std::size_t bytes) override {
    if (bytes == 0) return {nullptr, nullptr, &release, at::Device(at::kCPU)};
    char* block = static_cast<char*>(c10::alloc_cpu(bytes + kHeader));
    *reinterpret_cast<std::size_t*>(block) = bytes;
    count(static_cast<std::int64_t>(bytes));
    char* user = block + kHeader;
    return {user, user, &release, at::Device(at::kCPU)};
  }
  at::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* into, const void* from, std::size_t bytes) const override { default_copy_data(into, from, bytes); }
};

}  // namespace

std::int64_t resident_bytes() { return status_bytes("VmRSS:"); }
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
