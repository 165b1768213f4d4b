#include <algorithm>
#include <cctype>
#include <string_view>

#include "distributed/parallel/sharded_parameter.hpp"

namespace shardtune {
namespace {

// True when `word` stands at the end of a dotted name part: "word" or "word." follows.
bool ends_part(std::string_view name, std::string_view word, bool starts_part) {
  for (std::size_t at = name.find(word); at != std::string_view::npos; at = name.find(word, at + 1)) {
    const std::size_t after = at + word.size();
    const bool is_end = after == name.size() || name[after] == '.';
    const bool is_start = !starts_part || at == 0 || name[at - 1] == '.';
    if (is_end && is_start) return true;
  }
  return false;
}

}  // namespace

bool has_weight_decay(const Parameter& parameter) {
  if (parameter.is_norm) return false;
  std::string name = parameter.name;
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const char* word : {"bias", "layernorm", "rmsnorm"}) {
    if (name.find(word) != std::string::npos) return false;
  }
  return !ends_part(name, "norm", true) && !ends_part(name, "_norm", false);
}

}  // namespace shardtune
