#pragma once
// A complete small job on disk: model configuration, tokenizer, classification or text data. Deterministic.
#include <filesystem>
#include <string>

#include "trainer/options.hpp"

namespace shardtune::testing_support {

// minilm: a bert of the shape of MiniLM-L6 but for the vocabulary, 11 million parameters.
enum class TinyFamily { bert, llama, minilm };

// Creates DIR/model (config.json, tokenizer.json) and DIR/{train,validation}.jsonl and returns options that train it:
// random weights, dropout on, 4 examples a micro-batch, output in DIR/out.
RunOptions make_tiny_run(const std::filesystem::path& directory, TinyFamily family);

// SHA-256 of a file by the sha256sum program.
std::string sha256_of(const std::filesystem::path& file);

// A fresh directory below the test's temporary directory.
std::filesystem::path fresh_directory(const std::string& name);

// Runs a shell command; its standard output and error together, and its exit code.
struct CommandResult {
  int exit_code = 0;
  std::string output;
  double seconds = 0;
};
CommandResult run_command(const std::string& command);

// The shardtune program under test and `mpirun` with what containers and oversubscription need.
std::string shardtune_binary();
std::string mpirun_command(int num_ranks);

}  // namespace shardtune::testing_support
