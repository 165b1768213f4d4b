// What the program says of the memory, threads and instructions it uses, and does with them.
#include <algorithm>
#include <cstdlib>
#include <regex>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sched.h>

#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {

using testing_support::CommandResult;
using testing_support::fresh_directory;
using testing_support::run_command;
using testing_support::shardtune_binary;

class Resources : public ::testing::Test {
 protected:
  void TearDown() override { std::filesystem::remove_all(folder_); }

  CommandResult run(const std::string& before, const std::string& command, const std::string& arguments) const {
    return run_command(fmt::format("env -u OMP_NUM_THREADS {} {} {} --task text-classification {}", before,
                                   shardtune_binary(), command, arguments));
  }
  // Rows are cut to one length.
  CommandResult train(const std::string& before, const std::string& arguments) const {
    return run(
        before, "train",
        fmt::format("--config_name {} --tokenizer_name {} --train_file {} --output_dir {} --overwrite_output_dir "
                    "--save_strategy no --logging_steps 1 --per_device_train_batch_size 8 --max_seq_length 3 {}",
                    options_.model.config_name, options_.model.config_name, options_.data.train_file,
                    options_.train.output_dir, arguments));
  }

  const std::filesystem::path folder_ = fresh_directory("resources");
  const RunOptions options_ = testing_support::make_tiny_run(folder_, testing_support::TinyFamily::minilm);
};

TEST_F(Resources, NoPageIsNewAfterTheFirstSteps) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "this malloc keeps what is freed from being used again";
#endif
  const CommandResult result = train("", "--max_steps 8 --log_memory true");
  ASSERT_EQ(result.exit_code, 0) << result.output;
  std::vector<long> faults;
  const std::regex line(R"((\d+) page faults since the line before)");
  for (std::sregex_iterator match(result.output.begin(), result.output.end(), line), end; match != end; ++match)
    faults.push_back(std::stol((*match)[1]));
  ASSERT_EQ(faults.size(), 8U) << result.output;
  EXPECT_GT(faults[0], 100) << "the first step's are not counted";
  // Systems that move memory between sockets take pages away now and then.
  EXPECT_LE(*std::min_element(faults.begin() + 4, faults.end()), 16) << result.output;
}

TEST_F(Resources, PostponedHugePagesComeAfterTheFirstStep) {
  const std::string text = "the heap has huge pages from now on", postponed = "SHARDTUNE_HUGE_PAGES_POSTPONED=1";
  EXPECT_NE(train(postponed, "--max_steps 2 --log_level debug").output.find(text), std::string::npos);
  EXPECT_EQ(train(postponed, "--max_steps 1 --log_level debug").output.find(text), std::string::npos)
      << "a run of one step has no use for them";
}

TEST_F(Resources, EveryCommandSaysWhatItUses) {
  const CommandResult trained = train("SHARDTUNE_ISA=portable", "--max_steps 1 --num_threads 1");
  const CommandResult evaluated = run("SHARDTUNE_ISA=portable", "evaluate",
                                      fmt::format("--num_threads 1 --model_name_or_path {}/model --input {}",
                                                  options_.train.output_dir, options_.data.validation_file));
  for (const CommandResult& result : {trained, evaluated}) {
    ASSERT_EQ(result.exit_code, 0) << result.output;
    EXPECT_NE(result.output.find("1 ranks of 1 threads"), std::string::npos) << result.output;
    EXPECT_NE(result.output.find("kernels for portable"), std::string::npos) << result.output;
    EXPECT_TRUE(std::regex_search(result.output, std::regex(R"(peak memory of a rank: [1-9]\d+ MiB)"))) << result.output;
  }
  const CommandResult printed = train("SHARDTUNE_ISA=portable", "--print_config");
  EXPECT_NE(printed.output.find("# instructions of the kernels: portable"), std::string::npos) << printed.output;
}

TEST_F(Resources, MoreThreadsThanCoresAreWorthAWarning) {
  cpu_set_t mask;
  CPU_ZERO(&mask);
  ASSERT_EQ(::sched_getaffinity(0, sizeof mask, &mask), 0);
  const int cores = CPU_COUNT(&mask);
  const auto warning = [&](const std::string& before, const std::string& arguments) {
    const std::string output = train(before, "--max_steps 1 " + arguments).output;
    std::smatch match;
    return std::regex_search(output, match, std::regex(R"(\S+ = \d+: a rank has \d+ of)")) ? match.str() : std::string();
  };
  EXPECT_EQ(warning("", fmt::format("--num_threads {}", cores)), "");
  EXPECT_EQ(warning("", fmt::format("--num_threads {}", cores + 1)), fmt::format("--num_threads = {}: a rank has {} of", cores + 1, cores));
  EXPECT_EQ(warning(fmt::format("OMP_NUM_THREADS={}", cores + 1), ""), fmt::format("OMP_NUM_THREADS = {}: a rank has {} of", cores + 1, cores));
}

TEST(StandardOutput, ThatIsFullIsAFailure) {
  for (const char* arguments : {"--help", "--version", "train --help"}) {
    const CommandResult result = run_command(fmt::format("{} {} > /dev/full", shardtune_binary(), arguments));
    EXPECT_EQ(result.exit_code, 4) << result.output;
    EXPECT_NE(result.output.find("standard output cannot be written"), std::string::npos) << result.output;
  }
}

}  // namespace
}  // namespace shardtune
