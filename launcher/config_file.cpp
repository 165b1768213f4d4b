#include "launcher/config_file.hpp"

#include <algorithm>
#include <map>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/file.hpp"
#include "core/json.hpp"
#include "data/utf8.hpp"
#include "launcher/option_table.hpp"

namespace shardtune {
namespace {

constexpr std::size_t kMaxConfigBytes = 1 << 20;

std::string trimmed(const std::string& text) {
  const std::size_t begin = text.find_first_not_of(" \t\r");
  if (begin == std::string::npos) return "";
  return text.substr(begin, text.find_last_not_of(" \t\r") - begin + 1);
}

// Cuts a comment off, outside of quotes only.
std::string without_comment(const std::string& line) {
  char quote = 0;
  for (std::size_t i = 0; i < line.size(); ++i) {
    const char c = line[i];
    if (quote != 0) {
      if (c == quote) quote = 0;
    } else if (c == '"' || c == '\'') {
      // Only a quote that begins the value quotes; an apostrophe inside a word is a character.
      const std::size_t before = line.find_last_not_of(" \t", i == 0 ? 0 : i - 1);
      if (before != std::string::npos && line[before] == '=') quote = c;
    } else if (c == '#' && (i == 0 || line[i - 1] == ' ' || line[i - 1] == '\t')) {
      return line.substr(0, i);
    }
  }
  return line;
}

std::string unquoted(const std::string& value, const std::string& where) {
  if (value.empty() || (value.front() != '"' && value.front() != '\'')) return value;
  if (value.size() < 2 || value.back() != value.front())
    fail(ErrorKind::config, fmt::format("{}: the quote that begins {} is never closed", where, value));
  return value.substr(1, value.size() - 2);
}

std::vector<ConfigEntry> read_lines(const std::filesystem::path& file) {
  const std::string text = read_file(file, kMaxConfigBytes);
  std::vector<ConfigEntry> entries;
  std::size_t number = 0;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find('\n', begin), text.size());
    const std::string line = trimmed(without_comment(text.substr(begin, end - begin)));
    begin = end + 1;
    ++number;
    if (line.empty()) continue;
    const std::string where = fmt::format("{}:{}", file.string(), number);
    if (valid_utf8_prefix(line) < line.size()) fail(ErrorKind::config, fmt::format("{}: the line is no UTF-8; save the file in UTF-8", where));
    const std::size_t equals = line.find('=');
    if (equals == std::string::npos || equals == 0)
      fail(ErrorKind::config, fmt::format("{}: '{}' is no `name = value` line", where, line));
    entries.push_back({trimmed(line.substr(0, equals)), unquoted(trimmed(line.substr(equals + 1)), where), where});
  }
  return entries;
}

std::string json_text(const nlohmann::json& value, const std::string& where) {
  if (value.is_string()) return value.get<std::string>();
  if (value.is_boolean() || value.is_number_integer()) return value.dump();
  if (value.is_number()) return fmt::format("{}", value.get<double>());
  if (!value.is_array()) fail(ErrorKind::config, fmt::format("{}: a string, number, true, false or an array of them is needed", where));
  std::string list;
  for (const auto& item : value) list += (list.empty() ? "" : ",") + json_text(item, where);
  return list;
}

std::vector<ConfigEntry> read_json(const std::filesystem::path& file) {
  const nlohmann::json object = read_json_file(file, {.max_bytes = kMaxConfigBytes});
  if (!object.is_object()) fail(ErrorKind::config, fmt::format("{}: a JSON object of options is needed", file.string()));
  std::vector<ConfigEntry> entries;
  for (const auto& [name, value] : object.items()) {
    if (value.is_null()) continue;  // Hugging Face writes null for "not set"
    const std::string where = fmt::format("{}: {}", file.string(), name);
    entries.push_back({name, json_text(value, where), where});
  }
  return entries;
}

// A file that is missing or malformed is the configuration's fault here, which the readers of core call data.
std::vector<ConfigEntry> read_entries(const std::filesystem::path& file) {
  try {
    return file.extension() == ".json" ? read_json(file) : read_lines(file);
  } catch (const Error& e) {
    if (e.kind() != ErrorKind::data) throw;
    fail(ErrorKind::config, fmt::format("--config: {}", e.what()));
  }
}

}  // namespace

std::vector<ConfigEntry> read_config_file(const std::filesystem::path& file) {
  std::vector<ConfigEntry> entries = read_entries(file);
  std::map<std::string, std::string> seen;
  for (const ConfigEntry& entry : entries) {
    const auto [it, is_new] = seen.emplace(canonical_name(entry.name), entry.where);
    if (!is_new) fail(ErrorKind::config, fmt::format("{}: {} was given before at {}; leave one out", entry.where, entry.name, it->second));
  }
  return entries;
}

}  // namespace shardtune
