#include "core/log.hpp"

#include <atomic>
#include <cstdio>

#include <spdlog/details/log_msg.h>
#include <spdlog/pattern_formatter.h>
#include <spdlog/sinks/stdout_color_sinks.h>

namespace shardtune::log {
namespace {

// Process identity for log prefixes, written once by setup() before other threads start.
std::atomic<int> g_rank{0};
std::atomic<int> g_num_ranks{1};
std::atomic<Level> g_level{Level::info};

spdlog::level::level_enum to_spdlog(Level level) {
  switch (level) {
    case Level::debug: return spdlog::level::debug;
    case Level::info: return spdlog::level::info;
    case Level::warn: return spdlog::level::warn;
    case Level::error: return spdlog::level::err;
    case Level::off: return spdlog::level::off;
  }
  return spdlog::level::info;
}

spdlog::sinks::stderr_color_sink_mt& sink() {
  // Leaked on purpose: log lines may still come from threads that end after main's locals.
  static auto* instance = [] {
    auto* s = new spdlog::sinks::stderr_color_sink_mt();
    s->set_pattern("%H:%M:%S %^%L%$ %v");
    return s;
  }();
  return *instance;
}

void emit(Level level, const std::string& message) {
  sink().log(spdlog::details::log_msg(spdlog::source_loc{}, "", to_spdlog(level), message));
  sink().flush();
}

}  // namespace

void setup(int rank, int num_ranks, Level level) {
  g_rank = rank;
  g_num_ranks = num_ranks;
  g_level = level;
}

void set_level(Level level) { g_level = level; }

void write(Level level, const std::string& message) {
  if (level < g_level.load() || g_rank.load() != 0) return;
  emit(level, message);
}

void write_all_ranks(Level level, const std::string& message) {
  if (level < g_level.load()) return;
  emit(level, g_num_ranks > 1 ? fmt::format("[rank {}] {}", g_rank.load(), message) : message);
}

}  // namespace shardtune::log
