#include "launcher/failure_report.hpp"

#include <cerrno>
#include <cstdlib>
#include <functional>
#include <string>

#include <fcntl.h>
#include <unistd.h>

namespace shardtune {

std::filesystem::path job_directory() {
  const char* directory = std::getenv("PMIX_SERVER_TMPDIR");
  return directory == nullptr ? "" : directory;
}

bool claim_failure_report(const std::filesystem::path& job_directory, std::string_view text) noexcept {
  if (job_directory.empty()) return true;
  try {
    // Jobs that one daemon runs one after another may share the directory; their namespaces differ.
    const char* job = std::getenv("PMIX_NAMESPACE");
    const std::string file = job_directory / ("shardtune_failure." + std::string(job == nullptr ? "" : job) + "." +
                                              std::to_string(std::hash<std::string_view>()(text)));
    const int claim = ::open(file.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0600);
    if (claim < 0) return errno != EEXIST;
    (void)::close(claim);
    return true;
  } catch (...) {  // out of memory, at worst
    return true;
  }
}

}  // namespace shardtune
