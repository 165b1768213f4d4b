#include "launcher/command_line.hpp"

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <sstream>
#include <utility>

#include <boost/program_options.hpp>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/error.hpp"
#include "data/utf8.hpp"
#include "launcher/config_file.hpp"
#include "launcher/option_rows.hpp"
#include "models/model.hpp"

namespace shardtune {
namespace po = boost::program_options;
namespace {

struct CommandInfo {
  const char* name;
  const char* summary;
};
constexpr std::array<CommandInfo, 6> kCommands{{
    {"train", "fine-tune a model, or resume a run at any number of ranks"},
    {"evaluate", "metrics of a model on labelled rows, as one JSON object"},
    {"predict", "classes and probabilities of rows, as JSONL"},
    {"score", "logits, losses and log-probabilities of rows, as JSONL"},
    {"tokenize", "token ids of texts, as JSONL (one process, no MPI)"},
    {"checkpoint", "list, verify, inspect, diff, export, import, reshard, prune, repair (one process, no MPI)"},
}};

bool is_run_command(const std::string& command) { return command != "tokenize" && command != "checkpoint"; }

[[noreturn]] void refuse_unknown(const OptionTable& table, const std::string& command, const std::string& name, const std::string& where) {
  fail(ErrorKind::config, fmt::format("{}unknown option --{} of `shardtune {}`: {}", where, name, command, table.advice(command, name)));
}

// Everything that options name is compared between ranks and written as JSON.
void check_utf8(const std::vector<std::string>& arguments) {
  for (const std::string& argument : arguments)
    if (const std::size_t valid = valid_utf8_prefix(argument); valid < argument.size())
      fail(ErrorKind::config, fmt::format("'{}...': byte {} of this argument is no UTF-8; rename the file, or name it by a link with another name",
                                          argument.substr(0, valid), valid + 1));
}

bool is_switch(const std::string& name) { return name == "help" || name == "version" || name == "print_config"; }

// Rewrites options to the one spelling that the parser below knows: --name=value with the table's name; flags get their
// value, --no_flag becomes --flag=false. A value that looks like an option (a negative number) is fine after '='.
std::vector<std::string> normalize(const OptionTable& table, const std::string& command, const std::vector<std::string>& arguments) {
  std::vector<std::string> out;
  const auto push = [&](const std::string& name, const std::string& value) {
    if (!value.empty()) return out.push_back(fmt::format("--{}={}", name, value));
    out.push_back("--" + name);  // the parser wants something after '='
    out.push_back(value);
  };
  for (std::size_t i = 0; i < arguments.size(); ++i) {
    const std::string& word = arguments[i];
    if (word == "-h") {
      out.push_back("--help");
      continue;
    }
    if (!word.starts_with("--")) {
      if (word.size() > 1 && word.front() == '-')
        fail(ErrorKind::config, fmt::format("'{}': options begin with two dashes", word));
      out.push_back(word);
      continue;
    }
    const std::size_t equals = word.find('=');
    const std::string spelling = word.substr(2, equals == std::string::npos ? equals : equals - 2);
    std::string name = canonical_name(spelling);
    const OptionRow* row = table.find(command, name);
    if (is_switch(name) && equals == std::string::npos) {
      out.push_back("--" + name);
      continue;
    }
    if (row == nullptr && name.starts_with("no_")) {
      row = table.find(command, name.substr(3));
      if (row != nullptr && row->is_flag && equals == std::string::npos) {
        out.push_back(fmt::format("--{}=false", row->name));
        continue;
      }
      row = nullptr;
    }
    if (row == nullptr && name != "config") refuse_unknown(table, command, spelling, "");
    if (row != nullptr) name = row->name;
    if (equals != std::string::npos) {
      push(name, word.substr(equals + 1));
      continue;
    }
    const bool has_next = i + 1 < arguments.size() && !arguments[i + 1].starts_with("--");
    if (row != nullptr && row->is_flag) {
      static const std::set<std::string> words{"true", "false", "True", "False", "0", "1", "yes", "no", "on", "off"};
      const bool takes_next = has_next && words.contains(arguments[i + 1]);
      out.push_back(fmt::format("--{}={}", name, takes_next ? arguments[++i] : "true"));
      continue;
    }
    if (!has_next) fail(ErrorKind::config, fmt::format("--{} needs a value ({})", name, row != nullptr ? row->value_name : "FILE"));
    push(name, arguments[++i]);
  }
  return out;
}

po::options_description describe_options(const OptionTable& table, const std::string& command) {
  po::options_description all(100, 60);
  std::vector<std::string> groups;
  const auto rows = table.rows_of(command);
  for (const OptionRow* row : rows)
    if (std::find(groups.begin(), groups.end(), row->group) == groups.end()) groups.push_back(row->group);
  for (const std::string& group : groups) {
    po::options_description part(group, 100, 60);
    for (const OptionRow* row : rows) {
      if (row->group != group) continue;
      std::string help = row->help;
      if (const std::string value = row->text(); !value.empty()) help += fmt::format("{}[{}]", help.empty() ? "" : " ", value);
      part.add_options()(row->name.c_str(), po::value<std::vector<std::string>>()->value_name(row->value_name)->composing(), help.c_str());
    }
    all.add(part);
  }
  po::options_description general("General", 100, 60);
  general.add_options()("config", po::value<std::vector<std::string>>()->value_name("FILE")->composing(), "file of `name = value` lines, or .json; the command line wins");
  general.add_options()("print_config", "print every option with its value and end");
  general.add_options()("help", "this text")("version", "the version");
  return all.add(general);
}

// Values under the table's names, and the words that are no options.
struct Parsed {
  std::map<std::string, std::vector<std::string>> values;
  std::vector<std::string> words;
};

Parsed parse_words(const OptionTable& table, const std::string& command, const std::vector<std::string>& arguments) {
  po::options_description options = describe_options(table, command);
  options.add_options()("words", po::value<std::vector<std::string>>());
  po::positional_options_description positional;
  positional.add("words", -1);
  Parsed parsed;
  try {
    // No prefix guessing: --eval_s must not mean --eval_steps today and something else tomorrow.
    const int style = po::command_line_style::allow_long | po::command_line_style::long_allow_next;
    const auto result = po::command_line_parser(normalize(table, command, arguments)).options(options).positional(positional).style(style).run();
    for (const auto& option : result.options) {
      auto& into = option.string_key == "words" ? parsed.words : parsed.values[option.string_key];
      into.insert(into.end(), option.value.begin(), option.value.end());
    }
  } catch (const po::error& e) {
    fail(ErrorKind::config, fmt::format("{}; 'shardtune {} --help' lists all options", e.what(), command));
  }
  return parsed;
}

void set_option(const OptionRow& row, const std::string& value, const std::string& where) {
  try {
    row.set(value);
  } catch (const Error& e) {
    if (where.empty()) throw;
    fail(e.kind(), fmt::format("{}: {}", where, e.what()));
  }
}

// The entries of a configuration file that this command takes. One file may serve training and evaluation: what belongs
// to another subcommand is no mistake, and of several that are one option here and others there (`tokenize` takes its
// tokenizer from either of two) this command's own spelling, then the first in the table is taken.
std::map<const OptionRow*, ConfigEntry> entries_of(const OptionTable& table, const std::string& command, const std::string& file) {
  struct Chosen {
    ConfigEntry entry;
    std::size_t spelling;  // 0: the option's own name; else of its aliases
    bool is_foreign;       // another subcommand's option has this very name
  };
  std::map<const OptionRow*, Chosen> chosen;
  for (ConfigEntry& entry : read_config_file(file)) {
    const std::string name = canonical_name(entry.name);
    const auto is_named_so = [&](const OptionRow& row) { return row.name == name; };
    const auto& rows = table.rows();
    const OptionRow* row = table.find(command, name);
    if (row == nullptr) {
      if (std::any_of(rows.begin(), rows.end(), [&](const OptionRow& r) { return r.is_spelled(name); })) continue;
      refuse_unknown(table, command, entry.name, entry.where + ": ");
    }
    const auto alias = std::find(row->aliases.begin(), row->aliases.end(), name);
    const std::size_t spelling = row->name == name ? 0 : 1 + static_cast<std::size_t>(alias - row->aliases.begin());
    Chosen now{std::move(entry), spelling, spelling > 0 && std::any_of(rows.begin(), rows.end(), is_named_so)};
    const auto [it, is_new] = chosen.try_emplace(row, now);
    if (is_new) continue;
    Chosen& before = it->second;
    if (!now.is_foreign && !before.is_foreign)
      fail(ErrorKind::config, fmt::format("{}: {} is the same option as {} at {}; leave one out", now.entry.where, now.entry.name,
                                          before.entry.name, before.entry.where));
    if (std::pair(now.is_foreign, now.spelling) < std::pair(before.is_foreign, before.spelling)) before = std::move(now);
  }
  std::map<const OptionRow*, ConfigEntry> entries;
  for (auto& [row, of_row] : chosen) entries.emplace(row, std::move(of_row.entry));
  return entries;
}

void apply(const OptionTable& table, const Parsed& parsed, Invocation& invocation) {
  std::set<std::string> explicitly_set;
  if (const auto config = parsed.values.find("config"); config != parsed.values.end()) {
    if (config->second.size() > 1) fail(ErrorKind::config, "--config is given twice; one file holds the configuration");
    for (const auto& [row, entry] : entries_of(table, invocation.command, config->second.front())) {
      set_option(*row, entry.value, entry.where);
      explicitly_set.insert(row->name);
    }
  }
  for (const OptionRow* row : table.rows_of(invocation.command)) {
    const auto given = parsed.values.find(row->name);
    if (given == parsed.values.end()) continue;
    if (given->second.size() > 1 && !row->is_list)
      fail(ErrorKind::config, fmt::format("--{} is given more than once: {}; leave all but one out", row->name, fmt::join(given->second, ", ")));
    set_option(*row, fmt::format("{}", fmt::join(given->second, ",")), "");
    explicitly_set.insert(row->name);
  }
  invocation.run.explicitly_set.assign(explicitly_set.begin(), explicitly_set.end());
  for (const OptionRow* row : table.rows_of(invocation.command)) invocation.run.resolved.emplace_back(row->name, row->text());
}

std::string checkpoint_usage() {
  return "Usage: shardtune checkpoint ACTION PATH ... [OPTIONS], where CHECKPOINT is a checkpoint-<step> or an output directory (its newest)\n"
         "  list OUTPUT_DIR                    checkpoints, newest first\n"
         "  verify OUTPUT_DIR|CHECKPOINT ...   every byte against its checksum; exit code 3 for damage\n"
         "  inspect CHECKPOINT [--tensor NAME] what it holds as JSON, or statistics of one tensor\n"
         "  diff CHECKPOINT CHECKPOINT         what differs, bit for bit, as JSON; exit code 1 when anything does\n"
         "  export CHECKPOINT DIR              a Hugging Face model directory\n"
         "  import MODEL_DIR OUTPUT_DIR        a Hugging Face model as checkpoint-0\n"
         "  reshard CHECKPOINT OUTPUT_DIR --shards N   the same checkpoint in N files\n"
         "  prune OUTPUT_DIR --keep N          delete the oldest; the newest good and the best one stay\n"
         "  repair OUTPUT_DIR                  remove what killed saves left, rebuild `latest`\n";
}

std::string command_list() {
  std::vector<std::string> names;
  for (const CommandInfo& info : kCommands) names.emplace_back(info.name);
  return fmt::format("{}", fmt::join(names, ", "));
}

}  // namespace

Invocation parse_command_line(const std::vector<std::string>& arguments) {
  Invocation invocation;
  check_utf8(arguments);
  if (arguments.empty()) fail(ErrorKind::config, fmt::format("no subcommand; use one of {}, or --help", command_list()));
  if (arguments.front() == "--help" || arguments.front() == "-h" || arguments.front() == "help") {
    invocation.wants_help = true;
    return invocation;
  }
  if (arguments.front() == "--version") {
    invocation.wants_version = true;
    return invocation;
  }
  invocation.command = arguments.front();
  if (std::none_of(kCommands.begin(), kCommands.end(), [&](const CommandInfo& info) { return invocation.command == info.name; }))
    fail(ErrorKind::config, fmt::format("unknown subcommand '{}'; use one of {}, or --help", invocation.command, command_list()));
  const OptionTable table = make_option_table(invocation);
  const Parsed parsed = parse_words(table, invocation.command, {arguments.begin() + 1, arguments.end()});
  invocation.wants_help = parsed.values.contains("help");
  invocation.wants_version = parsed.values.contains("version");
  invocation.wants_config = parsed.values.contains("print_config");
  if (invocation.wants_help || invocation.wants_version) return invocation;
  if (invocation.command == "checkpoint") invocation.words = parsed.words;
  else if (!parsed.words.empty())
    fail(ErrorKind::config, fmt::format("stray word '{}': options are written --name value", parsed.words.front()));
  apply(table, parsed, invocation);
  if (is_run_command(invocation.command)) validate(invocation.run, invocation.command);
  return invocation;
}

std::string help_text(const std::string& command) {
  std::ostringstream text;
  if (command.empty()) {
    text << "shardtune fine-tunes Hugging Face models on many ranks.\n\nUsage: [mpirun -n RANKS] shardtune COMMAND [--name value ...]\n\nCommands:\n";
    for (const CommandInfo& info : kCommands) text << fmt::format("  {:<11} {}\n", info.name, info.summary);
    text << "\nModels:\n";
    for (const std::string& line : supported_models()) text << "  " << line << '\n';
    text << "\n'shardtune COMMAND --help' lists the options of a command.\n";
    return text.str();
  }
  Invocation defaults;
  defaults.command = command;
  const OptionTable table = make_option_table(defaults);
  const auto info = std::find_if(kCommands.begin(), kCommands.end(), [&](const CommandInfo& c) { return command == c.name; });
  text << fmt::format("shardtune {}: {}\n\n", command, info->summary);
  if (command == "checkpoint")
    text << checkpoint_usage() << "\n";
  text << "Options, defaults in brackets; '-' and '_' are alike, --flag means true, --no_flag false:\n\n" << describe_options(table, command);
  return text.str();
}

std::string config_text(const Invocation& invocation) { return resolved_text(invocation.run); }

}  // namespace shardtune
