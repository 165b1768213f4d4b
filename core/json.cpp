#include "core/json.hpp"

#include <cstdint>
#include <string>
#include <unordered_set>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/file.hpp"

namespace shardtune {
namespace {

// The parser says what it has read last, every control character in eight, and a key may be as long as the file: a message
// is for people. Whole UTF-8 characters stay.
std::string clipped(const std::string& what) {
  constexpr std::size_t kHead = 300, kTail = 60;
  const auto is_inside = [&](std::size_t at) { return (static_cast<unsigned char>(what[at]) & 0xC0) == 0x80; };
  if (what.size() <= kHead + kTail) return what;
  std::size_t head = kHead, tail = what.size() - kTail;
  while (head > 0 && is_inside(head)) --head;
  while (tail < what.size() && is_inside(tail)) ++tail;
  return what.substr(0, head) + " [...] " + what.substr(tail);
}

[[noreturn]] void refuse(const std::string& origin, const std::string& what) {
  fail(ErrorKind::data, fmt::format("{}: {}", origin, clipped(what)));
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

// Refuses depth and duplicate keys, in a pass of its own: nlohmann's parser with a callback looks through all members of an
// object again after each nested one, so an object of 100,000 objects would take minutes. The parser is not recursive.
class StructureCheck : public nlohmann::json_sax<nlohmann::json> {
 public:
  StructureCheck(const std::string& origin, int max_depth) : origin_(origin), max_depth_(max_depth) {}

  bool null() override { return value(); }
  bool boolean(bool) override { return value(); }
  bool number_integer(number_integer_t) override { return value(); }
  bool number_unsigned(number_unsigned_t) override { return value(); }
  bool number_float(number_float_t, const string_t&) override { return value(); }
  bool string(string_t&) override { return value(); }
  bool binary(binary_t&) override { return value(); }
  bool start_object(std::size_t) override { return value() && (keys_.emplace_back(), true); }
  bool start_array(std::size_t) override { return value() && (keys_.emplace_back(), true); }
  bool end_object() override { return keys_.pop_back(), true; }
  bool end_array() override { return keys_.pop_back(), true; }
  bool key(string_t& name) override {
    if (!keys_.back().insert(name).second) refuse(origin_, fmt::format("JSON key '{}' appears twice in one object", name));
    return value();
  }
  bool parse_error(std::size_t, const std::string&, const nlohmann::json::exception&) override { return false; }

 private:
  bool value() {
    if (static_cast<int>(keys_.size()) > max_depth_)
      refuse(origin_, fmt::format("JSON is nested deeper than {}", max_depth_));
    return true;
  }

  const std::string& origin_;
  const int max_depth_;
  std::vector<std::unordered_set<std::string>> keys_;  // of every open object; empty for arrays
};

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
  // JSON has no such byte anywhere; the parser takes it for the end of the text and would not look behind it.
  if (const std::size_t nul = text.find('\0'); nul != std::string_view::npos)
    refuse(origin, fmt::format("not valid JSON: a NUL byte at byte {}", nul));
  try {
    StructureCheck check(origin, limits.max_depth);
    nlohmann::json::sax_parse(text.begin(), text.end(), &check);  // what is no JSON at all is the parser's to say
    return nlohmann::json::parse(text.begin(), text.end());
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
