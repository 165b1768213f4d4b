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
  for (const auto& device : std::filesystem::directory_iterator("/sys/bus/virtio/drivers/virtio_balloon", error)) {
    std::string features;  // a digit for each bit, lowest first
    if (std::ifstream(device.path() / "features") >> features;
        features.size() > kReporting && features[kReporting] == '1')
      return true;
  }
  return false;
}

void postpone_huge_pages() {
  // Who has forbidden them altogether keeps that.
  if (::prctl(PR_GET_THP_DISABLE, 0, 0, 0, 0) == 0 && ::prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0) == 0)
    ::setenv(kPostponed, "1", 1);
}

void adopt_huge_pages() {
  static std::once_flag once;
  std::call_once(once, [] {
    if (std::getenv(kPostponed) == nullptr || ::prctl(PR_SET_THP_DISABLE, 0, 0, 0, 0) != 0) return;
    std::ifstream maps("/proc/self/maps");
    for (std::string line; std::getline(maps, line);) {
      if (!line.ends_with("[heap]")) continue;
      char* rest = nullptr;
      const std::uintptr_t begin = round_up(std::strtoull(line.c_str(), &rest, 16)),
                           end = std::strtoull(rest + 1, nullptr, 16);
      if (begin < end) ::madvise(reinterpret_cast<void*>(begin), end - begin, kCollapse);
    }
  });
}

#else

bool is_free_memory_returned() { return false; }
void postpone_huge_pages() {}
void adopt_huge_pages() {}

#endif

}  // namespace shardtune
