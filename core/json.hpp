#pragma once
// JSON from outside, read with limits. nlohmann/json does the parsing; this adds what hostile or broken files need.
#include <cstddef>
#include <filesystem>
#include <string>
#include <string_view>

#include <nlohmann/json_fwd.hpp>

namespace shardtune {

struct JsonLimits {
  std::size_t max_bytes = 256U << 20;
  int max_depth = 64;
  // Python's json writes NaN and Infinity bare; the HF Trainer's trainer_state.json holds them.
  bool allow_nan = false;
};

// Duplicate keys, invalid UTF-8, too much depth and trailing bytes are Error{data} naming `origin` (a file name or a
// description) and the byte offset. A UTF-8 byte order mark is skipped.
nlohmann::json parse_json(std::string_view text, const std::string& origin, const JsonLimits& limits = {});
nlohmann::json read_json_file(const std::filesystem::path& file, const JsonLimits& limits = {});

// Typed access with a message that names origin and key. T: bool, int64_t, double, std::string.
// Integers must be integers (4.0 is refused), doubles may be given as integers.
template <class T>
T json_get(const nlohmann::json& object, const char* key, const std::string& origin);
// The same with a default for a missing key or null.
template <class T>
T json_get_or(const nlohmann::json& object, const char* key, T fallback, const std::string& origin);

}  // namespace shardtune
