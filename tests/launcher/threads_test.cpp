// The number of threads does not change a bit of the result: ranks share the cores of a machine, so it follows from how
// many ranks there are. The program itself must be run, because it settles what the matrix library reads while it is
// loaded.
#include <filesystem>
#include <fstream>
#include <sstream>
#include <string>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {

using testing_support::fresh_directory;
using testing_support::TinyFamily;

// Rows of a micro-batch for more than 1000 tokens: from there on threads are worth sharing a weight's sum over tokens
// to MKL.
void repeat_rows(const std::string& file, int times) {
  std::ostringstream rows;
  rows << std::ifstream(file).rdbuf();
  std::ofstream out(file, std::ios::app);
  for (int i = 1; i < times; ++i) out << rows.str();
}

struct Case {
  bool bf16;
  const char* variables;  // for the program
};

std::string train(const RunOptions& options, const Case& c, int num_threads) {
  const std::string output = fmt::format("{}_{}", options.train.output_dir, num_threads);
  const auto result = testing_support::run_command(fmt::format(
      "{} {} train --config_name {} --task {} --train_file {} --output_dir {} --per_device_train_batch_size 244 "
      "--learning_rate 1e-3 --max_steps 5 --save_strategy no --bf16 {} --num_threads {} --overwrite_output_dir "
      "--disable_tqdm --log_level warn",
      c.variables, testing_support::shardtune_binary(), options.model.config_name, options.model.task,
      options.data.train_file, output, c.bf16, num_threads));
  EXPECT_EQ(result.exit_code, 0) << result.output;
  return testing_support::sha256_of(output + "/model/model.safetensors");
}

TEST(Threads, TheirNumberDoesNotChangeABit) {
  for (const TinyFamily family : {TinyFamily::bert, TinyFamily::llama}) {
    const auto directory = fresh_directory(fmt::format("threads_{}", static_cast<int>(family)));
    const RunOptions options = testing_support::make_tiny_run(directory, family);
    repeat_rows(options.data.train_file, 4);
    // As it starts; and without MKL's strict mode, as on processors that are not Intel's.
    for (const Case& c : {Case{false, "env -u MKL_CBWR"}, {true, "env -u MKL_CBWR"}, {false, "MKL_CBWR=AUTO"}}) {
      const std::string wanted = train(options, c, 1);
      for (const int num_threads : {2, 3})
        EXPECT_EQ(train(options, c, num_threads), wanted) << c.bf16 << c.variables << num_threads;
    }
    std::filesystem::remove_all(directory);
  }
}

}  // namespace
}  // namespace shardtune
