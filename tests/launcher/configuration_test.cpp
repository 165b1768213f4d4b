// Options on the command line and in files: what one run wrote another one reads, and what a file may hold for several.
#include <filesystem>
#include <fstream>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;
using namespace testing_support;

class Configuration : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = fresh_directory("configuration");
    options_ = make_tiny_run(directory_, TinyFamily::bert);
    out_ = options_.train.output_dir;
  }
  void TearDown() override { fs::remove_all(directory_); }

  std::string arguments() const {
    return fmt::format("--config_name {} --train_file {} --output_dir {} --log_level warn --disable_tqdm --num_threads 1 "
                       "--per_device_train_batch_size 4 --save_steps 1",
                       options_.model.config_name, options_.data.train_file, out_.string());
  }
  CommandResult shardtune(const std::string& command) const { return run_command(shardtune_binary() + " " + command); }
  void expect(const std::string& command, int exit_code, const std::string& words = "") const {
    const CommandResult result = shardtune(command);
    EXPECT_EQ(result.exit_code, exit_code) << command << ": " << result.output;
    EXPECT_NE(result.output.find(words), std::string::npos) << command << ": " << result.output;
  }
  fs::path write(const char* name, const std::string& text) const {
    std::ofstream(directory_ / name, std::ios::binary) << text;
    return directory_ / name;
  }

  fs::path directory_, out_;
  RunOptions options_;
};

TEST_F(Configuration, WhatPrintConfigPrintsStartsAndResumesTheSameRun) {
  for (const char* more : {"", "--optim sgd", "--fsdp 'full_shard auto_wrap'", "--global_batch_size 0"}) {
    const std::string file = (directory_ / "run.cfg").string();
    expect(fmt::format("train {} {} --max_steps 2 --print-config > {}", arguments(), more, file), 0);
    expect(fmt::format("train --config {} --overwrite_output_dir", file), 0);
    expect(fmt::format("train --config {} --resume_from_checkpoint auto --max_steps 3", file), 0);
    EXPECT_TRUE(fs::exists(out_ / "checkpoint-3")) << more;
    fs::remove_all(out_);
  }
}

TEST_F(Configuration, ValuesAreQuotedWhereTheFileWouldCutThem) {
  for (const std::string value : {"body # not a comment", "'a'", " a ", "say \"x\" # y", "#a", "plain", "it's"}) {
    const fs::path first = write("first.json", fmt::format("{{\"text_column\": \"{}\"}}", value.find('"') == value.npos ? value : "say \\\"x\\\" # y"));
    const std::string second = (directory_ / "second.cfg").string(), third = (directory_ / "third.cfg").string();
    expect(fmt::format("train {} --config {} --print-config > {}", arguments(), first.string(), second), 0);
    expect(fmt::format("train --config {} --print-config > {}", second, third), 0);
    EXPECT_EQ(run_command(fmt::format("cmp {} {}", second, third)).exit_code, 0) << value;
    EXPECT_EQ(run_command(fmt::format("grep -qF -- 'text_column' {}", third)).exit_code, 0) << value;
  }
}

TEST_F(Configuration, TwoSpellingsOfOneOptionAreTwice) {
  const fs::path file = write("twice.cfg", "max_seq_length = 12\nblock_size = 10\n");
  expect(fmt::format("train {} --config {}", arguments(), file.string()), 2, "block_size");
}

TEST_F(Configuration, OptionsOfOtherCommandsMayStandInAFileUnderAnyOfTheirNames) {
  const std::string tokenizer = fs::path(options_.model.config_name).string();
  const fs::path file = write("shared.cfg", fmt::format("evaluation_strategy = steps\nmodel_name_or_path = nowhere\ntokenizer_name = {}\n", tokenizer));
  const fs::path rows = write("rows.txt", "a\n");
  expect(fmt::format("tokenize --config {} --input {}", file.string(), rows.string()), 0, "input_ids");
}

TEST_F(Configuration, AnEmptyValueIsAValue) { expect(fmt::format("train {} --optim_args '' --max_steps 1", arguments()), 0); }

TEST_F(Configuration, ArgumentsAndFilesAreUtf8) {
  expect(fmt::format("train {} --text_column $(printf 'caf\\351')", arguments()), 2, "no UTF-8");
  const fs::path file = write("latin.cfg", "seed = 1\ntext_column = caf\xE9\n");
  expect(fmt::format("train {} --config {}", arguments(), file.string()), 2, "latin.cfg:2");
}

TEST_F(Configuration, AnInputIsNoOutput) {
  const fs::path rows = write("rows.jsonl", "{\"text\": \"a\"}\n");
  expect(fmt::format("tokenize --tokenizer {} --input {} --output {}", options_.model.config_name, rows.string(), rows.string()), 2, "is the input itself");
  EXPECT_GT(fs::file_size(rows), 0U);
}

// The tokenizer is read once: the checkpoint it came with is set aside when the new run starts.
TEST_F(Configuration, AModelFromACheckpointOfTheSameDirectoryKeepsItsTokenizer) {
  expect(fmt::format("train {} --max_steps 2", arguments()), 0);
  expect(fmt::format("train --model_name_or_path {0}/checkpoint-2 --train_file {1} --output_dir {0} --overwrite_output_dir --max_steps 3 "
                     "--save_steps 1 --log_level warn --disable_tqdm --num_threads 1",
                     out_.string(), options_.data.train_file),
         0);
  for (const char* place : {"model", "checkpoint-3"}) EXPECT_TRUE(fs::exists(out_ / place / "tokenizer.json")) << place;
}

TEST_F(Configuration, WhatACommandPrintedReachesAPipeWhateverItsExitCode) {
  expect(fmt::format("train {} --max_steps 2", arguments()), 0);
  expect(fmt::format("checkpoint diff {0}/checkpoint-1 {0}/checkpoint-2", out_.string()), 1, "{");
  fs::resize_file(out_ / "checkpoint-2" / "config.json", 1);
  expect(fmt::format("checkpoint verify {}", out_.string()), 3, "checkpoint-1: good");
}

}  // namespace
}  // namespace shardtune
