#pragma once
// A table of named, typed options bound to fields of option structs: one row is the option's spelling, help, default, setter
// and printed value. Knows nothing of where values come from. Not thread-safe.
#include <cstdint>
#include <functional>
#include <map>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include "trainer/options.hpp"

namespace shardtune {

struct OptionRow {
  std::string name;                  // with underscores, as in Hugging Face
  std::string group;                 // heading in --help
  std::string value_name;            // FILE, N, true|false ...
  std::string help;
  std::vector<std::string> aliases;  // other accepted spellings
  std::vector<std::string> commands; // subcommands that have it
  bool is_spelled(const std::string& canonical) const;  // as its name or one of its aliases
  bool is_flag = false;              // `--name` alone means true, `--no_name` false
  bool is_list = false;              // comma-separated or repeated
  // Error{config} naming option, value and what is wanted.
  std::function<void(const std::string& value)> set;
  std::function<std::string()> text;  // the present value as set() would take it; empty = not set
};

class OptionTable {
 public:
  // Options added after it belong to this group and these subcommands.
  void begin_group(std::string group, std::vector<std::string> commands);

  // `target` outlives the table and holds the default.
  OptionRow& add(const std::string& name, std::string& target, const std::string& value_name, const std::string& help);
  OptionRow& add(const std::string& name, std::int64_t& target, const std::string& help);
  OptionRow& add(const std::string& name, std::optional<std::int64_t>& target, const std::string& help);
  OptionRow& add(const std::string& name, double& target, const std::string& help);
  OptionRow& add(const std::string& name, bool& target, const std::string& help);
  OptionRow& add(const std::string& name, std::optional<bool>& target, const std::string& help);
  OptionRow& add(const std::string& name, Interval& target, const std::string& help);
  OptionRow& add(const std::string& name, std::vector<std::string>& target, const std::string& value_name, const std::string& help);
  // A row whose value lives in a map under the option's name; absent = not set.
  OptionRow& add_to_map(const std::string& name, std::map<std::string, double>& target, const std::string& help);

  const std::vector<OptionRow>& rows() const noexcept { return rows_; }
  // Rows of one subcommand, in table order.
  std::vector<const OptionRow*> rows_of(const std::string& command) const;
  // By name or alias, '-' and '_' alike; nullptr when there is none for this subcommand.
  const OptionRow* find(const std::string& command, std::string_view name) const;
  // What to tell a user who wrote `name`: the nearest option, another subcommand that has it, or what to use instead of a
  // Hugging Face argument that shardtune does not have. Never empty.
  std::string advice(const std::string& command, std::string_view name) const;

 private:
  OptionRow& add_row(const std::string& name, const std::string& value_name, const std::string& help);

  std::vector<OptionRow> rows_;
  std::string group_;
  std::vector<std::string> commands_;
};

// "learning-rate" -> "learning_rate".
std::string canonical_name(std::string_view name);

}  // namespace shardtune
