#pragma once
// Logging front. log::info and friends print on rank 0 only; log::all_ranks::* print on every rank with its number.
// Output goes to standard error (standard output belongs to results). Thread-safe.
// Metrics are not log lines: they go to observers.
#include <string>
#include <utility>

#include <fmt/format.h>

namespace shardtune::log {

enum class Level { debug, info, warn, error, off };

// Call once from main before other threads start. color_terminal: use colours when stderr is a terminal.
void setup(int rank, int num_ranks, Level level);
void set_level(Level level);

// The unformatted sinks; prefer the templates below.
void write(Level level, const std::string& message);
void write_all_ranks(Level level, const std::string& message);

template <class... Args>
void debug(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::debug, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void info(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::info, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void warn(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::warn, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void error(fmt::format_string<Args...> format, Args&&... args) {
  write(Level::error, fmt::format(format, std::forward<Args>(args)...));
}

namespace all_ranks {
template <class... Args>
void warn(fmt::format_string<Args...> format, Args&&... args) {
  write_all_ranks(Level::warn, fmt::format(format, std::forward<Args>(args)...));
}
template <class... Args>
void error(fmt::format_string<Args...> format, Args&&... args) {
  write_all_ranks(Level::error, fmt::format(format, std::forward<Args>(args)...));
}
}  // namespace all_ranks

}  // namespace shardtune::log
