// Bad input is normal: each case ends with the documented exit code and one message that names what to mend.
#include <array>
#include <fstream>
#include <functional>
#include <sstream>
#include <tuple>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/instruction_set.hpp"
#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;
using namespace testing_support;

class BadInput : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = fresh_directory(testing::UnitTest::GetInstance()->current_test_info()->name());
    options_ = make_tiny_run(directory_, TinyFamily::bert);
  }
  void TearDown() override { fs::remove_all(directory_); }

  std::string arguments(int max_steps = 2) const {
    return fmt::format("--config_name {} --train_file {} --validation_file {} --output_dir {} --max_steps {} --log_level warn "
                       "--disable_tqdm --num_threads 1 --per_device_train_batch_size 4",
                       options_.model.config_name, options_.data.train_file, options_.data.validation_file,
                       options_.train.output_dir, max_steps);
  }
  // A model with weights: trains two steps and returns the exported directory.
  fs::path trained_model() {
    const CommandResult result = run_command(fmt::format("{} train {} --save_steps 1", shardtune_binary(), arguments()));
    EXPECT_EQ(result.exit_code, 0) << result.output;
    return fs::path(options_.train.output_dir) / "model";
  }
  void expect_failure(const std::string& command, int exit_code, const std::vector<std::string>& words) {
    const CommandResult result = run_command(command);
    EXPECT_EQ(result.exit_code, exit_code) << result.output;
    for (const std::string& word : words) EXPECT_NE(result.output.find(word), std::string::npos) << "'" << word << "' in: " << result.output;
    std::size_t messages = 0;
    for (std::size_t at = 0; (at = result.output.find("error (", at)) != std::string::npos; ++at) ++messages;
    EXPECT_LE(messages, 1U) << "the message must appear once: " << result.output;
    EXPECT_LT(result.seconds, 20) << "a failing job must end in seconds";
  }
  void expect_train_failure(const std::string& more, int exit_code, const std::vector<std::string>& words) {
    expect_failure(fmt::format("{} train {} {}", shardtune_binary(), arguments(), more), exit_code, words);
    expect_failure(fmt::format("{} {} train {} {}", mpirun_command(2), shardtune_binary(), arguments(), more), exit_code, words);
  }
  void rewrite(const std::string& file, const std::function<void(std::string&)>& edit) {
    std::ifstream in(file, std::ios::binary);
    std::string content((std::istreambuf_iterator<char>(in)), {});
    edit(content);
    std::ofstream(file, std::ios::binary) << content;
  }

  fs::path directory_;
  RunOptions options_;
};

TEST_F(BadInput, MisspeltOptionSuggestsTheNearestName) {
  expect_train_failure("--learning_rat 1e-3", 2, {"learning_rat", "learning_rate"});
}

TEST_F(BadInput, ConfigurationFileMissingOrMalformed) {
  const auto config = [&](const std::string& name, const std::string& content) {
    std::ofstream(directory_ / name) << content;
    return "--config " + (directory_ / name).string();
  };
  expect_train_failure("--config " + (directory_ / "nowhere.cfg").string(), 2, {"--config", "nowhere.cfg", "No such file"});
  expect_train_failure("--config " + directory_.string(), 2, {"--config", directory_.string(), "directory"});
  expect_train_failure(config("a.cfg", "seed = 1\nlearning_rate 1e-3\n"), 2, {"a.cfg:2", "name = value"});
  expect_train_failure(config("b.cfg", "\nlog_level = \"warn\n"), 2, {"b.cfg:2", "never closed"});
  expect_train_failure(config("c.json", "{\"seed\": 1"), 2, {"c.json", "not valid JSON"});
  expect_train_failure(config("d.json", "[1]"), 2, {"d.json", "object"});
  expect_train_failure(config("e.json", "{\"seed\": {}}"), 2, {"e.json", "seed"});
}

TEST_F(BadInput, MissingModelDirectory) {
  options_.model.config_name = (directory_ / "nowhere").string();
  expect_train_failure("", 3, {"config_name", (directory_ / "nowhere").string()});
  expect_failure(fmt::format("{} evaluate --model_name_or_path {}/absent --input {}", shardtune_binary(), directory_.string(),
                             options_.data.validation_file),
                 3, {"model_name_or_path", "absent"});
}

TEST_F(BadInput, MissingTokenizer) {
  fs::remove(fs::path(options_.model.config_name) / "tokenizer.json");
  expect_train_failure("", 2, {"tokenizer", "--tokenizer_name"});
  expect_train_failure("--tokenizer_name " + directory_.string(), 3, {"tokenizer.json", directory_.string()});
}

// Only training turns a signal into an orderly end.
TEST_F(BadInput, ASignalEndsWhatIsNoTraining) {
  const fs::path model = trained_model();
  const std::string input = (directory_ / "never.jsonl").string();
  // Nobody ever writes to the pipe, so the program waits for its first row.
  const CommandResult result = run_command(fmt::format("mkfifo {0} && timeout --signal TERM --kill-after 10 3 {1} predict --model_name_or_path {2} --input {0}",
                                                       input, shardtune_binary(), model.string()));
  EXPECT_EQ(result.exit_code, 124) << result.output;  // 137: it had to be killed
}

TEST_F(BadInput, WrongLabelColumn) {
  expect_train_failure("--label_column category", 3, {"category", "label", "text", "train.jsonl"});
}

TEST_F(BadInput, UnknownLabelInValidation) {
  std::ofstream(options_.data.validation_file, std::ios::app) << R"({"text": "w1 w2", "label": "classX"})" << '\n';
  expect_train_failure("", 3, {"validation.jsonl", "18", "classX", "class0"});
}

TEST_F(BadInput, EmptyFile) {
  std::ofstream(options_.data.train_file, std::ios::trunc);
  expect_train_failure("", 3, {"train.jsonl", "empty"});
}

TEST_F(BadInput, InvalidUtf8) {
  std::ofstream(options_.data.train_file, std::ios::app) << "{\"text\": \"w1 \xff w2\", \"label\": \"class0\"}\n";
  expect_train_failure("", 3, {"train.jsonl", "62", "UTF-8"});
}

TEST_F(BadInput, RowThatIsNoJson) {
  std::ofstream(options_.data.train_file, std::ios::app) << "text: w1, label: class0\n";
  expect_train_failure("", 3, {"train.jsonl", "62", "JSON"});
}

TEST_F(BadInput, SequenceLongerThanTheModelAllows) {
  expect_train_failure("--max_seq_length 41", 2, {"max_seq_length", "41", "40"});
  // A text is cut to what the model allows; ids are taken as they are or not at all.
  std::string text = "w1", ids = "5";
  for (int i = 0; i < 40; ++i) text += " w1", ids += ",5";
  std::ofstream(options_.data.train_file, std::ios::app) << fmt::format("{{\"text\": \"{}\", \"label\": \"class0\"}}\n", text);
  const CommandResult cut = run_command(fmt::format("{} train {} --overwrite_output_dir", shardtune_binary(), arguments(16)));
  EXPECT_EQ(cut.exit_code, 0) << "16 steps of 4 read all 62 rows: " << cut.output;
  std::ofstream(options_.data.train_file, std::ios::app) << fmt::format("{{\"input_ids\": [{}], \"label\": \"class0\"}}\n", ids);
  expect_train_failure("--overwrite_output_dir", 3, {"train.jsonl:63", "41", "40"});
}

TEST_F(BadInput, TruncatedAndCorruptedSafetensors) {
  const fs::path model = trained_model();
  const std::string command = fmt::format("{} evaluate --model_name_or_path {} --input {}", shardtune_binary(), model.string(),
                                          options_.data.validation_file);
  ASSERT_EQ(run_command(command).exit_code, 0);
  const std::string file = (model / "model.safetensors").string();
  std::string whole;
  rewrite(file, [&](std::string& bytes) {
    whole = bytes;
    bytes.resize(bytes.size() - 100);
  });
  expect_failure(command, 3, {"model.safetensors", "the file holds"});
  // Inside the header's JSON, and the header's length itself; the file is whole otherwise.
  for (const auto& [position, byte, words] : std::vector<std::tuple<std::size_t, char, std::string>>{{9, '#', "JSON"}, {6, '\1', "header"}}) {
    rewrite(file, [&, at = position, value = byte](std::string& bytes) {
      bytes = whole;
      bytes[at] = value;
    });
    expect_failure(command, 3, {"model.safetensors", words});
  }
  rewrite(file, [&](std::string& bytes) { bytes = whole; });
  EXPECT_EQ(run_command(command).exit_code, 0) << "only the damage made it fail";
}

TEST_F(BadInput, UnsupportedArchitecture) {
  rewrite(options_.model.config_name + "/config.json", [](std::string& text) {
    text = R"({"architectures": ["FancyForSequenceClassification"], "model_type": "fancy"})";
  });
  expect_train_failure("", 2, {"Fancy", "bert", "llama", "config.json"});
}

TEST_F(BadInput, CheckpointOfAnotherModel) {
  trained_model();
  rewrite(options_.model.config_name + "/config.json", [](std::string& text) {
    const std::size_t at = text.find("\"intermediate_size\": 40");
    ASSERT_NE(at, std::string::npos);
    text.replace(at, 23, "\"intermediate_size\": 48");
  });
  expect_train_failure("--resume_from_checkpoint true", 3, {"another model"});
}

TEST_F(BadInput, OutputDirectoryNotWritable) {
  std::ofstream(directory_ / "file") << "x";
  options_.train.output_dir = (directory_ / "file" / "out").string();
  expect_train_failure("", 4, {"output_dir", options_.train.output_dir});
}

TEST_F(BadInput, DiskFullDuringASaveKeepsTheOldCheckpoint) {
  trained_model();  // checkpoints 1 and 2
  // A file size limit fails writes as a full disk does, without needing the right to mount one.
  const std::string command = fmt::format("sh -c \"trap '' XFSZ; ulimit -f 8; exec {} train {} --save_steps 1 --resume_from_checkpoint true\"",
                                          shardtune_binary(), arguments(4));
  expect_failure(command, 4, {"checkpoint-3"});
  EXPECT_EQ(run_command(fmt::format("{} checkpoint verify {}/checkpoint-2", shardtune_binary(), options_.train.output_dir)).exit_code, 0);
  EXPECT_FALSE(fs::exists(fs::path(options_.train.output_dir) / "checkpoint-3"));
  const CommandResult resumed = run_command(
      fmt::format("{} train {} --save_steps 1 --resume_from_checkpoint true", shardtune_binary(), arguments(4)));
  EXPECT_EQ(resumed.exit_code, 0) << resumed.output;
}

TEST_F(BadInput, CheckpointUnderAnotherName) {
  trained_model();
  const std::string verify = fmt::format("{} checkpoint verify {}/", shardtune_binary(), options_.train.output_dir);
  fs::rename(fs::path(options_.train.output_dir) / "checkpoint-2", fs::path(options_.train.output_dir) / "best");
  EXPECT_EQ(run_command(verify + "checkpoint-1/").exit_code, 0);
  for (const char* name : {"best", "best/"}) expect_failure(verify + name, 3, {"/best", "rename it to checkpoint-<step>"});
  fs::rename(fs::path(options_.train.output_dir) / "best", fs::path(options_.train.output_dir) / "checkpoint-2.rejected-x");
  expect_failure(verify + "checkpoint-2.rejected-x", 3, {"checkpoint-2.rejected-x", "set aside"});
}

TEST_F(BadInput, OutputDirectoryWithCheckpointsNeedsADecision) {
  trained_model();
  expect_train_failure("", 2, {"output_dir", "resume_from_checkpoint", "overwrite_output_dir"});
}

TEST_F(BadInput, ResumingWithAContradictingOption) {
  trained_model();
  expect_train_failure("--resume_from_checkpoint true --seed 7", 2, {"seed", "7", "42"});
}

TEST_F(BadInput, ResumeWithoutACheckpoint) {
  expect_train_failure("--resume_from_checkpoint true", 2, {"resume_from_checkpoint", "auto"});
}

TEST_F(BadInput, RanksStartedWithDifferentConfigurations) {
  const std::string a = fmt::format("{} train {} --learning_rate 1e-3", shardtune_binary(), arguments());
  const std::string b = fmt::format("{} train {} --learning_rate 2e-3", shardtune_binary(), arguments());
  const std::string mpirun = mpirun_command(1);
  expect_failure(fmt::format("{} {} : -n 1 {}", mpirun, a, b), 2, {"learning_rate", "0.001", "0.002", "rank 1"});
}

TEST_F(BadInput, RanksStartedWithDifferentPlans) {
  const std::string same = fmt::format("{} train {}", shardtune_binary(), arguments());
  for (const auto& [first, second, option] : std::vector<std::array<std::string, 3>>{
           {"--sharding zero3", "--sharding ddp", "sharding"},
           {"--sharding hsdp --hsdp_shard_size 2", "--sharding hsdp --hsdp_shard_size 1", "hsdp_shard_size"},
           {"--fsdp full_shard", "--fsdp shard_grad_op", "fsdp"}})
    expect_failure(fmt::format("{} {} {} : -n 1 {} {}", mpirun_command(1), same, first, same, second), 2,
                   {"--" + option, "different configurations", "on rank 0", "on rank 1", "give all ranks the same"});
}

TEST_F(BadInput, HsdpShardSizeThatDoesNotFit) {
  expect_train_failure("--sharding hsdp --hsdp_shard_size 3", 2,
                       {"--hsdp_shard_size = 3", "does not divide", "choose a divisor"});
  expect_train_failure("--sharding hsdp --hsdp_shard_size 4294967298", 2,
                       {"--hsdp_shard_size = 4294967298", "1000000"});
  expect_train_failure("--sharding zero3 --hsdp_shard_size 1", 2,
                       {"--hsdp_shard_size = 1", "needs --sharding hsdp", "leave the option out"});
}

TEST_F(BadInput, Fp16OnAProcessorWithoutIt) {
  if (half_precision().has_fp16) {
    const CommandResult result = run_command(fmt::format("{} train {} --fp16", shardtune_binary(), arguments()));
    EXPECT_EQ(result.exit_code, 0) << result.output;
  } else {
    expect_train_failure("--fp16", 2, {"--fp16 true", "no fp16 arithmetic", "use --bf16 true"});
  }
}

TEST_F(BadInput, FrozenWeightsThatCannotBeSharedAreNamedOnce) {
  expect_train_failure("--sharding zero3 --share_frozen_weights", 2,
                       {"--share_frozen_weights = true", "zero3", "use ddp"});
  const auto warnings = [&](const std::string& environment, const std::string& freeze) {
    const CommandResult result =
        run_command(fmt::format("{} {} {} train {} --overwrite_output_dir --share_frozen_weights {}", environment,
                                mpirun_command(2), shardtune_binary(), arguments(), freeze));
    EXPECT_EQ(result.exit_code, 0) << result.output;
    std::vector<std::string> lines;
    std::istringstream output(result.output);
    for (std::string line; std::getline(output, line);)
      if (line.find("--share_frozen_weights") != std::string::npos) lines.push_back(line);
    return lines;
  };
  const std::string freeze = "--freeze 'bert.embeddings.*'";
  EXPECT_TRUE(warnings("", freeze).empty());
  const auto nothing = warnings("", "");
  ASSERT_EQ(nothing.size(), 1U);
  EXPECT_NE(nothing.front().find("nothing is frozen"), std::string::npos) << nothing.front();
  const auto refused = warnings("SHARDTUNE_COMM=mpi", freeze);
  ASSERT_EQ(refused.size(), 1U);
  EXPECT_NE(refused.front().find("no shared memory"), std::string::npos) << refused.front();
}

// Not refused: what comes out is a good model, but no other machine will give its bits.
TEST_F(BadInput, RanksOnDifferentProcessorsAreNamedOnce) {
  ASSERT_NE(best_instruction_set(), InstructionSet::portable);
  const std::string rank = fmt::format("{} train {} --bf16", shardtune_binary(), arguments());
  const CommandResult result = run_command(
      fmt::format("{} env -u SHARDTUNE_ISA {} : -n 1 env SHARDTUNE_ISA=portable {}", mpirun_command(1), rank, rank));
  EXPECT_EQ(result.exit_code, 0) << result.output;
  const std::string wanted =
      fmt::format("kernels: \"{}\" on rank 0, \"portable\" on rank 1", name_of(best_instruction_set()));
  const std::size_t found = result.output.find(wanted);
  ASSERT_NE(found, std::string::npos) << result.output;
  EXPECT_EQ(result.output.find("different conditions", found), std::string::npos) << result.output;
}

TEST_F(BadInput, FreezePatternThatMatchesNothing) {
  expect_train_failure("--freeze 'bert.embedings.*'", 2, {"freeze", "bert.embedings.*"});
}

}  // namespace
}  // namespace shardtune
