#include "core/host.hpp"

#include <array>

#include <unistd.h>

namespace shardtune {

std::string host_name() {
  std::array<char, 256> name{};  // POSIX allows 255 bytes; the last one stays the end
  return ::gethostname(name.data(), name.size() - 1) == 0 ? name.data() : "";
}

}  // namespace shardtune
