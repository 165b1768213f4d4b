#include "core/json.hpp"

#include <cstdint>
#include <set>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/file.hpp"

namespace shardtune {
namespace {

[[noreturn]] void refuse(const std::string& origin, const std::string& what) {
  fail(ErrorKind::data, fmt::format("{}: {}", origin, what));
}

// Python's bare NaN, Infinity and -Infinity become null outside strings; everything else stays as it is.
std::string without_bare_nan(std::string_view text) {
  std::string out;
  out.reserve(text.size());
  bool in_string = false;
  for (std::size_t i = 0; i < text.size();) {
    if (in_string) {
      if (text[i] == '\\' && i + 1 < text.size()) out += text[i++];
      else if (text[i] == '"') in_string = false;
      out += text[i++];
      continue;
    }
    std::size_t skip = 0;
    for (std::string_view word : {"NaN", "Infinity", "-Infinity"})
      if (text.substr(i, word.size()) == word) skip = word.size();
    if (skip != 0) {
      out += "null";
      i += skip;
      continue;
    }
    in_string = text[i] == '"';
    out += text[i++];
  }
  return out;
}

}  // namespace

nlohmann::json parse_json(std::string_view text, const std::string& origin, const JsonLimits& limits) {
  if (text.size() > limits.max_bytes)
    refuse(origin, fmt::format("{} bytes of JSON are more than the limit of {}", text.size(), limits.max_bytes));
  if (text.substr(0, 3) == "\xEF\xBB\xBF") text.remove_prefix(3);
  std::string cleaned;
  if (limits.allow_nan) {
    cleaned = without_bare_nan(text);
    text = cleaned;
  }
  // nlohmann's parser is recursive in nothing but its own callback depth; depth and duplicate keys are checked here.
  std::vector<std::set<std::string>> keys;
  auto callback = [&](int depth, nlohmann::json::parse_event_t event, nlohmann::json& value) {
    using Event = nlohmann::json::parse_event_t;
    if (depth > limits.max_depth) refuse(origin, fmt::format("JSON is nested deeper than {}", limits.max_depth));
    if (event == Event::object_start) keys.emplace_back();
    if (event == Event::object_end) keys.pop_back();
    if (event == Event::key && !keys.back().insert(value.get<std::string>()).second)
      refuse(origin, fmt::format("JSON key '{}' appears twice in one object", value.get<std::string>()));
    return true;
  };
  try {
    return nlohmann::json::parse(text.begin(), text.end(), callback);
  } catch (const nlohmann::json::exception& e) {
    refuse(origin, fmt::format("not valid JSON: {}", e.what()));
  }
}

nlohmann::json read_json_file(const std::filesystem::path& file, const JsonLimits& limits) {
  return parse_json(read_file(file, limits.max_bytes), file.string(), limits);
}

namespace {

template <class T>
bool holds(const nlohmann::json& value) {
  if constexpr (std::is_same_v<T, bool>) return value.is_boolean();
  else if constexpr (std::is_same_v<T, std::int64_t>)
    return value.is_number_integer() && !(value.is_number_unsigned() && value.get<std::uint64_t>() > INT64_MAX);
  else if constexpr (std::is_same_v<T, double>) return value.is_number();
  else return value.is_string();
}
template <class T>
constexpr const char* kTypeName = std::is_same_v<T, bool>           ? "true or false"
                                  : std::is_same_v<T, std::int64_t> ? "an integer"
                                  : std::is_same_v<T, double>       ? "a number"
                                                                    : "a string";
}  // namespace

template <class T>
T json_get(const nlohmann::json& object, const char* key, const std::string& origin) {
  if (!object.is_object()) refuse(origin, fmt::format("expected a JSON object holding '{}'", key));
  const auto it = object.find(key);
  if (it == object.end()) refuse(origin, fmt::format("key '{}' is missing", key));
  if (!holds<T>(*it)) refuse(origin, fmt::format("'{}' must be {}, got {}", key, kTypeName<T>, it->dump().substr(0, 80)));
  return it->get<T>();
}

template <class T>
T json_get_or(const nlohmann::json& object, const char* key, T fallback, const std::string& origin) {
  if (!object.is_object() || !object.contains(key) || object.at(key).is_null()) return fallback;
  return json_get<T>(object, key, origin);
}

template bool json_get(const nlohmann::json&, const char*, const std::string&);
template std::int64_t json_get(const nlohmann::json&, const char*, const std::string&);
template double json_get(const nlohmann::json&, const char*, const std::string&);
template std::string json_get(const nlohmann::json&, const char*, const std::string&);
template bool json_get_or(const nlohmann::json&, const char*, bool, const std::string&);
template std::int64_t json_get_or(const nlohmann::json&, const char*, std::int64_t, const std::string&);
template double json_get_or(const nlohmann::json&, const char*, double, const std::string&);
template std::string json_get_or(const nlohmann::json&, const char*, std::string, const std::string&);

}  // namespace shardtune
