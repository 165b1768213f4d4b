#include "core/huge_pages.hpp"

#ifdef __linux__
#include <sys/mman.h>
#include <sys/prctl.h>

#include <cstdint>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <mutex>
#include <string>
#include <system_error>
#endif

namespace shardtune {

#ifdef __linux__

namespace {

constexpr std::uintptr_t kHugePage = 2 << 20;
constexpr char kPostponed[] = "SHARDTUNE_HUGE_PAGES_POSTPONED";  // how exec hands on that it was this program's doing
constexpr int kCollapse = 25;                                    // MADV_COLLAPSE, which glibc 2.36 does not name

constexpr std::uintptr_t round_up(std::uintptr_t address) { return (address + kHugePage - 1) / kHugePage * kHugePage; }

}  // namespace

bool is_free_memory_returned() {
  constexpr std::size_t kReporting = 5;  // VIRTIO_BALLOON_F_REPORTING
  std::error_code error;
  std::filesystem::directory_iterator device("/sys/bus/virtio/drivers/virtio_balloon", error), end;
  for (; !error && device != end; device.increment(error)) {
    std::string features;  // a digit for each bit, lowest first
    if (std::ifstream(device->path() / "features") >> features;
        features.size() > kReporting && features[kReporting] == '1')
      return true;
  }
  return false;
}

bool postpone_huge_pages() {
  if (::madvise(nullptr, 0, kCollapse) != 0) return false;
  // Who has forbidden them altogether keeps that.
  if (::prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) != 0 || ::prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) != 0) return false;
  return ::setenv(kPostponed, "1", 1) == 0;
}

bool adopt_huge_pages() {
  static std::once_flag once;  // what it ends belongs to the process
  bool was_postponed = false;
  std::call_once(once, [&] {
    was_postponed = std::getenv(kPostponed) != nullptr && ::prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0) == 0;
    if (!was_postponed) return;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      if (!line.ends_with("[heap]")) continue;
      char* rest = nullptr;
      const std::uintptr_t begin = round_up(std::strtoull(line.c_str(), &rest, 16)),
                           end = std::strtoull(rest + 1, nullptr, 16);
      // Where the system lacks huge pages the rest stays as it is: slower, and the kernel's own thread goes on.
      if (begin < end) static_cast<void>(::madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse));
    }
  });
  return was_postponed;
}

#else

bool is_free_memory_returned() { return false; }
bool postpone_huge_pages() { return false; }
bool adopt_huge_pages() { return false; }

#endif

}  // namespace shardtune
