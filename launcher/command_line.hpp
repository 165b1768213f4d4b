#pragma once
// From argv to one checked value. Grammar: docs/formats.md. Pure: prints nothing, needs no MPI.
#include <string>
#include <vector>

#include "launcher/option_table.hpp"
#include "trainer/options.hpp"

namespace shardtune {

struct TokenizeOptions {
  std::string input, output;
  std::string text_column = "text", text_pair_column = "text_pair";
  std::int64_t max_length = 0;     // truncation in tokens, 0 = none
  bool add_special_tokens = true;
};

struct CheckpointToolOptions {
  std::string tensor;                    // inspect: statistics of this parameter
  std::string format = "safetensors";    // export
  std::string dtype = "float32";         // export
  std::string max_shard_size = "50GB";   // export
  std::int64_t shards = 0;               // reshard; 0 = not given
  std::int64_t keep = 0;                 // prune; 0 = not given
};

// One start of the program.
struct Invocation {
  std::string command;              // train, evaluate, ...; empty: only --help or --version were asked for
  bool wants_help = false, wants_version = false, wants_config = false;
  RunOptions run;
  InferenceOptions inference;
  TokenizeOptions tokenize;
  CheckpointToolOptions checkpoint;
  std::vector<std::string> words;   // of `checkpoint`: the action and its paths
};

// Error{config}: unknown subcommand or option (with the nearest name), a missing or malformed value, an option given twice, a
// stray word, and what validate() refuses. Error{data}: an unreadable configuration file.
// The options of `run` are resolved: defaults, then --config, then the command line.
Invocation parse_command_line(const std::vector<std::string>& arguments);

// Text of --help for a subcommand, or for the program when it is empty.
std::string help_text(const std::string& command);
// `name = value` lines that --config would read back: every option of the subcommand that has a value.
std::string config_text(const Invocation& invocation);

}  // namespace shardtune
