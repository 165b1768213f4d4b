#include "tests/fuzz/fuzz_support.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <fmt/format.h>

namespace shardtune::fuzz {
namespace fs = std::filesystem;
namespace {

struct Scratch {
  fs::path path = fs::temp_directory_path() / fmt::format("shardtune_fuzz_{}", ::getpid());
  Scratch() { fs::create_directories(path); }
  ~Scratch() {
    std::error_code ignored;
    fs::remove_all(path, ignored);
  }
};

}  // namespace

const fs::path& scratch_directory() {
  static const Scratch scratch;
  return scratch.path;
}

void put(const fs::path& file, std::string_view bytes) {
  const int fd = ::open(file.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  require(fd >= 0);
  require(::write(fd, bytes.data(), bytes.size()) == static_cast<ssize_t>(bytes.size()));
  ::close(fd);
}

}  // namespace shardtune::fuzz
