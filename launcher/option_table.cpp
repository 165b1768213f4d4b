#include "launcher/option_table.hpp"

#include <algorithm>
#include <charconv>
#include <map>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

[[noreturn]] void refuse(const std::string& name, const std::string& value, const char* wanted) {
  fail(ErrorKind::config, fmt::format("--{} = '{}': {} is needed", name, value, wanted));
}

template <class T>
T parse_number(const std::string& name, const std::string& value, const char* wanted) {
  T number{};
  const char* const end = value.data() + value.size();
  const auto [stop, error] = std::from_chars(value.data(), end, number);
  if (error != std::errc{} || stop != end) refuse(name, value, wanted);
  return number;
}

std::int64_t parse_integer(const std::string& name, const std::string& value) {
  return parse_number<std::int64_t>(name, value, "a whole number");
}

bool parse_flag(const std::string& name, const std::string& value) {
  for (const char* word : {"true", "True", "1", "yes", "on"})
    if (value == word) return true;
  for (const char* word : {"false", "False", "0", "no", "off"})
    if (value == word) return false;
  refuse(name, value, "true or false");
}

std::vector<std::string> split_list(const std::string& text) {
  std::vector<std::string> items;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    if (end > begin) items.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return items;
}

// Restricted Damerau-Levenshtein distance: inserts, deletes, replacements and swaps of neighbours.
std::size_t edit_distance(std::string_view a, std::string_view b) {
  std::vector<std::vector<std::size_t>> d(a.size() + 1, std::vector<std::size_t>(b.size() + 1));
  for (std::size_t i = 0; i <= a.size(); ++i) d[i][0] = i;
  for (std::size_t j = 0; j <= b.size(); ++j) d[0][j] = j;
  for (std::size_t i = 1; i <= a.size(); ++i) {
    for (std::size_t j = 1; j <= b.size(); ++j) {
      d[i][j] = std::min({d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] == b[j - 1] ? 0 : 1)});
      if (i > 1 && j > 1 && a[i - 1] == b[j - 2] && a[i - 2] == b[j - 1]) d[i][j] = std::min(d[i][j], d[i - 2][j - 2] + 1);
    }
  }
  return d[a.size()][b.size()];
}

// Hugging Face arguments that people bring along and shardtune does not have: what to do instead.
const std::map<std::string, std::string, std::less<>>& foreign_arguments() {
  static const std::map<std::string, std::string, std::less<>> advice = {
      {"deepspeed", "ZeRO is built in: use --sharding"},
      {"fsdp_config", "units are always the model's layers; use --fsdp or --sharding, and --reshard_after_forward"},
      {"do_train", "use the subcommand train"},
      {"do_eval", "use --eval_strategy, or the subcommand evaluate"},
      {"do_predict", "use the subcommand predict"},
      {"report_to", "metrics go to OUTPUT_DIR/metrics.jsonl"},
      {"logging_dir", "metrics go to OUTPUT_DIR/metrics.jsonl"},
      {"push_to_hub", "nothing is uploaded; OUTPUT_DIR/model is a Hugging Face directory"},
      {"group_by_length", "batches are packed without padding, so grouping by length gains nothing; leave it out"},
      {"dataloader_num_workers", "one thread per rank tokenizes ahead; leave it out"},
      {"dataloader_pin_memory", "leave it out"},
      {"torch_compile", "leave it out"},
      {"use_cpu", "leave it out: training runs on CPUs"},
      {"no_cuda", "leave it out: training runs on CPUs"},
      {"use_fast_tokenizer", "leave it out: tokenizer.json is always used"},
      {"dataset_name", "give files with --train_file and --validation_file"},
      {"task_name", "give files with --train_file and --validation_file, and --task"},
      {"pad_to_max_length", "batches are packed without padding; leave it out"},
      {"remove_unused_columns", "only the named columns are read; leave it out"},
      {"ddp_find_unused_parameters", "leave it out"},
      {"ddp_timeout", "leave it out"},
  };
  return advice;
}

}  // namespace

std::string canonical_name(std::string_view name) {
  std::string result(name);
  std::replace(result.begin(), result.end(), '-', '_');
  return result;
}

void OptionTable::begin_group(std::string group, std::vector<std::string> commands) {
  group_ = std::move(group);
  commands_ = std::move(commands);
}

OptionRow& OptionTable::add_row(const std::string& name, const std::string& value_name, const std::string& help) {
  OptionRow row;
  row.name = name;
  row.group = group_;
  row.value_name = value_name;
  row.help = help;
  row.commands = commands_;
  return rows_.emplace_back(std::move(row));
}

OptionRow& OptionTable::add(const std::string& name, std::string& target, const std::string& value_name, const std::string& help) {
  OptionRow& row = add_row(name, value_name, help);
  row.set = [&target](const std::string& value) { target = value; };
  row.text = [&target] { return target; };
  return row;
}

OptionRow& OptionTable::add(const std::string& name, std::int64_t& target, const std::string& help) {
  OptionRow& row = add_row(name, "N", help);
  row.set = [&target, name](const std::string& value) { target = parse_integer(name, value); };
  row.text = [&target] { return std::to_string(target); };
  return row;
}

OptionRow& OptionTable::add(const std::string& name, std::optional<std::int64_t>& target, const std::string& help) {
  OptionRow& row = add_row(name, "N", help);
  row.set = [&target, name](const std::string& value) { target = parse_integer(name, value); };
  row.text = [&target] { return target ? std::to_string(*target) : std::string(); };
  return row;
}

OptionRow& OptionTable::add(const std::string& name, double& target, const std::string& help) {
  OptionRow& row = add_row(name, "X", help);
  row.set = [&target, name](const std::string& value) { target = parse_number<double>(name, value, "a number"); };
  row.text = [&target] { return fmt::format("{}", target); };
  return row;
}

OptionRow& OptionTable::add(const std::string& name, bool& target, const std::string& help) {
  OptionRow& row = add_row(name, "true|false", help);
  row.is_flag = true;
  row.set = [&target, name](const std::string& value) { target = parse_flag(name, value); };
  row.text = [&target] { return std::string(target ? "true" : "false"); };
  return row;
}

OptionRow& OptionTable::add(const std::string& name, std::optional<bool>& target, const std::string& help) {
  OptionRow& row = add_row(name, "true|false", help);
  row.is_flag = true;
  row.set = [&target, name](const std::string& value) { target = parse_flag(name, value); };
  row.text = [&target] { return std::string(!target ? "" : *target ? "true" : "false"); };
  return row;
}

OptionRow& OptionTable::add(const std::string& name, Interval& target, const std::string& help) {
  OptionRow& row = add_row(name, "no|steps|epoch", help);
  row.set = [&target, name](const std::string& value) {
    if (value == "no") target = Interval::no;
    else if (value == "steps") target = Interval::steps;
    else if (value == "epoch") target = Interval::epoch;
    else refuse(name, value, "no, steps or epoch");
  };
  row.text = [&target] { return std::string(target == Interval::no ? "no" : target == Interval::steps ? "steps" : "epoch"); };
  return row;
}

OptionRow& OptionTable::add(const std::string& name, std::vector<std::string>& target, const std::string& value_name,
                            const std::string& help) {
  OptionRow& row = add_row(name, value_name, help);
  row.is_list = true;
  row.set = [&target](const std::string& value) { target = split_list(value); };
  row.text = [&target] { return fmt::format("{}", fmt::join(target, ",")); };
  return row;
}

OptionRow& OptionTable::add_to_map(const std::string& name, std::map<std::string, double>& target, const std::string& help) {
  OptionRow& row = add_row(name, "X", help);
  row.set = [&target, name](const std::string& value) { target[name] = parse_number<double>(name, value, "a number"); };
  row.text = [&target, name] {
    const auto it = target.find(name);
    return it == target.end() ? std::string() : fmt::format("{}", it->second);
  };
  return row;
}

std::vector<const OptionRow*> OptionTable::rows_of(const std::string& command) const {
  std::vector<const OptionRow*> found;
  for (const OptionRow& row : rows_)
    if (std::find(row.commands.begin(), row.commands.end(), command) != row.commands.end()) found.push_back(&row);
  return found;
}

bool OptionRow::is_spelled(const std::string& canonical) const {
  return name == canonical || std::find(aliases.begin(), aliases.end(), canonical) != aliases.end();
}

const OptionRow* OptionTable::find(const std::string& command, std::string_view name) const {
  const std::string wanted = canonical_name(name);
  for (const OptionRow* row : rows_of(command))
    if (row->is_spelled(wanted)) return row;
  return nullptr;
}

std::string OptionTable::advice(const std::string& command, std::string_view name) const {
  const std::string wanted = canonical_name(name);
  for (const OptionRow& row : rows_)
    if (row.name == wanted) return fmt::format("it belongs to the subcommand{} {}", row.commands.size() > 1 ? "s" : "", fmt::join(row.commands, ", "));
  if (const auto foreign = foreign_arguments().find(wanted); foreign != foreign_arguments().end())
    return fmt::format("shardtune does not have this Hugging Face argument; {}", foreign->second);
  std::string nearest;
  std::size_t best = wanted.size() / 3 + 2;
  for (const OptionRow* row : rows_of(command)) {
    const std::size_t distance = edit_distance(wanted, row->name);
    if (distance < best) {
      best = distance;
      nearest = row->name;
    }
  }
  if (!nearest.empty()) return fmt::format("did you mean --{}?", nearest);
  return fmt::format("'shardtune {} --help' lists all options", command);
}

}  // namespace shardtune
