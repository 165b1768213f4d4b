#include "distributed/comm/environment_settings.hpp"

#include <array>
#include <charconv>
#include <cstdlib>
#include <string>
#include <string_view>

#include <fmt/format.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

std::string_view value_of(const char* variable) {
  const char* value = std::getenv(variable);
  return value == nullptr ? "" : value;
}

[[noreturn]] void refuse(const char* variable, std::string_view value, const char* use) {
  fail(ErrorKind::config, fmt::format("{} is '{}'; use {}", variable, value, use));
}

// 0 when not set.
int read_positive(const char* variable) {
  const std::string_view value = value_of(variable);
  if (value.empty()) return 0;
  int number = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size() || number < 1) {
    refuse(variable, value, "a whole number above 0");
  }
  return number;
}

bool read_switch(const char* variable) {
  const std::string_view value = value_of(variable);
  if (value.empty() || value == "0") return false;
  if (value == "1") return true;
  refuse(variable, value, "0 or 1");
}

SharedMemoryUse read_use(const char* variable) {
  const std::string_view value = value_of(variable);
  if (value.empty() || value == "auto") return SharedMemoryUse::if_possible;
  if (value == "shm") return SharedMemoryUse::always;
  if (value == "mpi") return SharedMemoryUse::never;
  refuse(variable, value, "auto, shm or mpi");
}

// In the order of strictness.
constexpr std::array kUses = {SharedMemoryUse::if_possible, SharedMemoryUse::always, SharedMemoryUse::never};

}  // namespace

EnvironmentSettings read_environment_settings() {
  EnvironmentSettings settings;
  settings.check_collectives = read_switch("SHARDTUNE_CHECK_COLLECTIVES");
  settings.use = read_use("SHARDTUNE_COMM");
  settings.timeout = std::chrono::seconds(read_positive("SHARDTUNE_COMM_TIMEOUT"));
  settings.ranks_per_node = read_positive("SHARDTUNE_RANKS_PER_NODE");
  return settings;
}

EnvironmentSettings agree(Transport& transport, const EnvironmentSettings& mine) {
  std::array<std::int64_t, 4> values = {mine.check_collectives ? 1 : 0, 0, mine.timeout.count(), mine.ranks_per_node};
  while (kUses[static_cast<std::size_t>(values[1])] != mine.use) ++values[1];
  transport.all_reduce(reinterpret_cast<std::byte*>(values.data()), std::ssize(values), {at::kLong, ReduceOp::max});
  EnvironmentSettings agreed;
  agreed.check_collectives = values[0] != 0;
  agreed.use = kUses[static_cast<std::size_t>(values[1])];
  agreed.timeout = std::chrono::seconds(values[2]);
  agreed.ranks_per_node = static_cast<int>(values[3]);
  return agreed;
}

}  // namespace shardtune
