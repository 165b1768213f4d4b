// What a whole run computes as its loss, evaluates, saves and exports, and what a resumed one takes over.
#include <cmath>
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <functional>
#include <utility>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/support/error_of.hpp"
#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"
#include "trainer/commands.hpp"

namespace shardtune {
namespace {

using testing_support::CommandResult;
using testing_support::error_of;
using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::mpirun_command;
using testing_support::run_command;
using testing_support::sha256_of;
using testing_support::shardtune_binary;
using testing_support::TinyFamily;
using testing_support::train_on_threads;
using Steps = std::vector<std::int64_t>;

Steps saved_steps(const RunOptions& options) {
  Steps steps;
  for (const CheckpointInfo& info : list_checkpoints(options.train.output_dir)) steps.push_back(info.step);
  return steps;
}

// Steps of the records of metrics.jsonl that have this key.
Steps recorded_steps(const RunOptions& options, const char* key) {
  Steps steps;
  std::ifstream file(options.train.output_dir + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    const nlohmann::json record = nlohmann::json::parse(line);
    if (record.contains(key)) steps.push_back(record.at("step").get<std::int64_t>());
  }
  return steps;
}

// The values of `key` in metrics.jsonl.
std::vector<double> recorded(const RunOptions& options, const char* key) {
  std::vector<double> values;
  std::ifstream file(options.train.output_dir + "/metrics.jsonl");
  for (std::string line; std::getline(file, line);) {
    const nlohmann::json record = nlohmann::json::parse(line);
    if (record.contains(key)) values.push_back(record.at(key).get<double>());
  }
  return values;
}

// Where nothing is learned every loss is linear in the factor; that the values are transformers' the golden models
// show.
TEST(LabelSmoothing, ReachesEveryLossOfTrainingAndEvaluation) {
  for (const TinyFamily family : {TinyFamily::bert, TinyFamily::llama}) {
    const auto directory = fresh_directory("label_smoothing");
    RunOptions options = make_tiny_run(directory, family);
    options.train.learning_rate = 0;
    options.train.max_steps = 3;
    options.train.eval_strategy = Interval::steps;
    options.train.eval_steps = 3;
    options.train.eval_on_start = true;
    const std::vector<std::string> keys{"loss", "loss", "loss", "eval_loss", "eval_loss"};
    std::vector<std::vector<double>> losses;
    for (const double factor : {0.0, 0.2, 0.6}) {
      options.train.label_smoothing_factor = factor;
      options.train.output_dir = (directory / fmt::format("out_{}", factor)).string();
      train_on_threads(options, 2);
      losses.push_back(recorded(options, "loss"));
      for (const double loss : recorded(options, "eval_loss")) losses.back().push_back(loss);
      ASSERT_EQ(losses.back().size(), keys.size());
    }
    for (std::size_t i = 0; i < keys.size(); ++i) {
      const double plain = losses[0][i], change = losses[1][i] - plain;
      EXPECT_GT(std::abs(change), 1e-5) << keys[i] << ", record " << i;
      EXPECT_NEAR(losses[2][i] - plain, 3 * change, 2e-6 * plain) << keys[i] << ", record " << i;
    }
    std::filesystem::remove_all(directory);
  }
}

// Nothing is learned, so the first of equal evaluations stays the best; no save is due at its step.
TEST(BestModel, IsSavedWhereNoSaveIsDue) {
  const auto directory = fresh_directory("best_model");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.learning_rate = 0;
  options.train.max_steps = 9;
  options.train.eval_strategy = options.train.save_strategy = Interval::steps;
  options.train.eval_on_start = true;  // as in Hugging Face no candidate
  options.train.eval_steps = 2;
  options.train.save_steps = 5;
  options.train.save_total_limit = 1;
  options.train.load_best_model_at_end = true;
  train_on_threads(options, 2);
  EXPECT_EQ(recorded_steps(options, "eval_loss"), (Steps{0, 2, 4, 6, 8}));
  EXPECT_EQ(saved_steps(options), (Steps{9, 2}));
  std::filesystem::remove_all(directory);
}

// A run that goes on in another directory: its best model stays where it was.
TEST(BestModel, OfARunBegunInAnotherDirectoryIsFoundThere) {
  const auto directory = fresh_directory("best_elsewhere");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.greater_is_better = true;  // of losses: the first evaluation's
  options.train.max_steps = 4;
  options.train.eval_strategy = options.train.save_strategy = Interval::steps;
  options.train.eval_steps = options.train.save_steps = 2;
  options.train.load_best_model_at_end = true;
  train_on_threads(options, 2);
  const std::filesystem::path before = options.train.output_dir;
  options.train.resume_from_checkpoint = (before / "checkpoint-4").string();
  options.train.output_dir += "_elsewhere";
  options.train.max_steps = 6;
  const std::string best = train_on_threads(options, 2);
  EXPECT_EQ(best, sha256_of(before / "model/model.safetensors"));
  std::filesystem::remove_all(before / "checkpoint-2");
  options.train.overwrite_output_dir = true;
  run_thread_ranks(2, [&](Communicator& world) { EXPECT_EQ(run_train(options, world), 4) << "its best model is gone"; });
  EXPECT_TRUE(std::filesystem::exists(options.train.output_dir + "/model/model.safetensors"));
  std::filesystem::remove_all(directory);
}

// 61 rows in batches of 4 are 16 steps an epoch; Hugging Face ends an incomplete epoch like a whole one.
TEST(EpochStrategies, IncludeTheEndOfAnIncompleteEpoch) {
  const auto directory = fresh_directory("epoch_strategies");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.max_steps = 20;
  options.train.logging_strategy = options.train.eval_strategy = options.train.save_strategy = Interval::epoch;
  train_on_threads(options, 1);
  EXPECT_EQ(recorded_steps(options, "loss"), (Steps{16, 20}));
  EXPECT_EQ(recorded_steps(options, "eval_loss"), (Steps{16, 20}));
  EXPECT_EQ(saved_steps(options), (Steps{20, 16}));
  std::filesystem::remove_all(directory);
}

// The only file of a cache directory, if any.
std::filesystem::path kept_bucket_size(const std::filesystem::path& cache) {
  if (!std::filesystem::exists(cache)) return {};
  return std::filesystem::directory_iterator(cache)->path();
}

TEST(BucketSize, IsMeasuredUnlessGivenAndChangesNoBit) {
  const auto directory = fresh_directory("bucket_size");
  const char* before = std::getenv("XDG_CACHE_HOME");
  const std::string cache_before = before != nullptr ? before : "";
  ::setenv("XDG_CACHE_HOME", (directory / "cache").c_str(), 1);
  RunOptions options = make_tiny_run(directory, TinyFamily::minilm);  // units of several MiB
  options.train.max_steps = 2;
  options.train.logging_strategy = options.train.save_strategy = Interval::no;
  for (const char* plan : {"ddp", "zero3"}) {
    options.train.sharding = plan;
    options.train.overwrite_output_dir = true;
    options.train.ddp_bucket_cap_mb = 1;
    const std::string given = train_on_threads(options, 2);
    EXPECT_EQ(kept_bucket_size(directory / "cache" / "shardtune"), std::filesystem::path());
    options.train.ddp_bucket_cap_mb = 0;
    EXPECT_EQ(train_on_threads(options, 2), given);
    const std::filesystem::path file = kept_bucket_size(directory / "cache" / "shardtune");
    ASSERT_FALSE(file.empty());
    nlohmann::json kept = nlohmann::json::parse(std::ifstream(file));
    for (const std::int64_t mib : {1, 8}) {
      kept["bucket_bytes"] = mib << 20;
      std::ofstream(file) << kept;
      EXPECT_EQ(train_on_threads(options, 2), given) << plan << " " << mib;
      EXPECT_EQ(nlohmann::json::parse(std::ifstream(file)), kept) << "the file was not taken as it is";
    }
    std::filesystem::remove_all(directory / "cache");
  }
  if (before == nullptr)
    ::unsetenv("XDG_CACHE_HOME");
  else
    ::setenv("XDG_CACHE_HOME", cache_before.c_str(), 1);
  std::filesystem::remove_all(directory);
}

// A container's /dev/shm: in 64 MiB the gathered weights fit but not all buffers of zero3, in 40 not the one of ddp, in 24
// nothing but the slots does.
TEST(SmallSharedMemory, ChangesNothingButTheSpeed) {
  const auto within = [](const std::string& size, const std::string& command) {
    return fmt::format("unshare -m sh -c 'mount -t tmpfs -o size={} tmpfs /dev/shm && exec \"$@\"' sh {}", size,
                       command);
  };
  if (run_command(within("64m", "true")).exit_code != 0) GTEST_SKIP() << "this user may not mount a small /dev/shm";
  const auto directory = fresh_directory("small_shared_memory");
  const RunOptions options = make_tiny_run(directory, TinyFamily::minilm);
  const std::string train = fmt::format(
      "{} {} train --config_name {} --train_file {} --output_dir {} --overwrite_output_dir --max_steps 1 --num_threads 1 "
      "--per_device_train_batch_size 4 --global_batch_size 16 --save_strategy no --log_level warn --disable_tqdm "
      "--ddp_bucket_cap_mb 8 --sharding ",
      mpirun_command(4), shardtune_binary(), options.model.config_name, options.data.train_file,
      options.train.output_dir);
  std::vector<std::string> hashes;
  const auto run = [&](const std::string& command) {
    const CommandResult result = run_command("timeout -k 5 100 " + command);
    EXPECT_EQ(result.exit_code, 0) << command << ": " << result.output;
    hashes.push_back(sha256_of(options.train.output_dir + "/model/model.safetensors"));
    EXPECT_EQ(hashes.back(), hashes.front()) << command;
    return result.output;
  };
  (void)run(train + "ddp");
  using Case = std::pair<const char*, const char*>;
  for (const auto& [size, plan] : {Case{"40m", "ddp"}, Case{"64m", "zero3"}, Case{"24m", "zero3"}}) {
    const std::string output = run(within(size, train + plan));
    EXPECT_NE(output.find("bytes of shared memory in /dev/shm"), std::string::npos) << output;
  }
  std::filesystem::remove_all(directory);
}

class Resume : public testing::Test {
 protected:
  void SetUp() override {
    directory_ = fresh_directory("resume_identity");
    options_ = make_tiny_run(directory_, TinyFamily::llama);
    options_.train.lr_scheduler_type = "constant";
    options_.train.save_strategy = Interval::steps;
    options_.train.save_steps = 1000;  // at the end only
    options_.model.dropout["attention_dropout"] = 0.2;
  }
  void TearDown() override { std::filesystem::remove_all(directory_); }

  // As a user who repeats what describes the run but not these.
  RunOptions resumed() const {
    RunOptions options = options_;
    options.train.seed = 42;
    options.train.global_batch_size = 0;
    options.train.label_smoothing_factor = 0;
    options.data.max_seq_length = 0;
    options.train.resume_from_checkpoint = "true";
    options.train.max_steps = 8;
    return options;
  }

  std::filesystem::path directory_;
  RunOptions options_;
};

TEST_F(Resume, TakesOverWhatTheRunWasStartedWith) {
  options_.train.seed = 7;
  options_.data.max_seq_length = 9;
  options_.train.label_smoothing_factor = 0.1;
  options_.train.max_steps = 8;
  const std::string uninterrupted = train_on_threads(options_, 2);
  options_.train.output_dir += "_in_two_parts";
  options_.train.max_steps = 3;
  train_on_threads(options_, 2);
  EXPECT_EQ(train_on_threads(resumed(), 1), uninterrupted);
}

TEST_F(Resume, RefusesWhatContradictsIt) {
  options_.train.max_steps = 3;
  train_on_threads(options_, 1);
  RunOptions options = resumed();
  options.train.seed = 8;
  options.explicitly_set = {"seed"};
  const std::string said = error_of(ErrorKind::config, [&] { train_on_threads(options, 1); });
  for (const char* word : {"--seed = 8", "started with 42"}) EXPECT_NE(said.find(word), std::string::npos) << said;
  RunOptions smoothed = resumed();
  smoothed.train.label_smoothing_factor = 0.1;
  smoothed.explicitly_set = {"label_smoothing_factor"};
  const std::string also_said = error_of(ErrorKind::config, [&] { train_on_threads(smoothed, 1); });
  for (const char* word : {"--label_smoothing_factor = 0.1", "started with 0"})
    EXPECT_NE(also_said.find(word), std::string::npos) << also_said;
}

TEST(Options, AnExplicitShardingMustAgreeWithFsdp) {
  const auto directory = fresh_directory("fsdp_or_sharding");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.fsdp = "full_shard auto_wrap";
  EXPECT_NO_THROW(validate(options, "train"));
  options.explicitly_set = {"sharding"};
  const std::string said = error_of(ErrorKind::config, [&] { validate(options, "train"); });
  for (const char* word : {"full_shard", "zero3", "ddp"}) EXPECT_NE(said.find(word), std::string::npos) << said;
  std::filesystem::remove_all(directory);
}

TEST(Options, NumbersThatWouldNotSurviveTheirUseAreRefused) {
  const auto directory = fresh_directory("large_numbers");
  const RunOptions good = make_tiny_run(directory, TinyFamily::bert);
  const auto said = [&](const std::function<void(TrainOptions&)>& spoil) {
    RunOptions options = good;
    spoil(options.train);
    return error_of(ErrorKind::config, [&] { validate(options, "train"); });
  };
  const std::string size = said([](TrainOptions& train) {
    train.sharding = "hsdp";
    train.hsdp_shard_size = 4294967298;  // 2 in 32 bits
  });
  EXPECT_NE(size.find("--hsdp_shard_size = 4294967298: 0"), std::string::npos) << size;
  const auto refuses = [&](const char* words, const std::function<void(TrainOptions&)>& spoil) {
    const std::string message = said(spoil);
    EXPECT_NE(message.find(words), std::string::npos) << message;
  };
  refuses("--save_total_limit = 4294967297: 0", [](TrainOptions& train) { train.save_total_limit = 4294967297; });
  refuses("--num_train_epochs = 1e+18: more", [](TrainOptions& train) { train.num_train_epochs = 1e18; });
  refuses("--warmup_steps = 1e+19: 0", [](TrainOptions& train) { train.warmup_steps = 1e19; });
  refuses("--checkpoint_staging_mb = 17592186044416: 1", [](TrainOptions& train) { train.checkpoint_staging_mb = std::int64_t{1} << 44; });
  refuses("--gradient_accumulation_steps = 4611686018427387904: 1",
          [](TrainOptions& train) { train.gradient_accumulation_steps = std::int64_t{1} << 62; });
  refuses("--eval_steps = -5: 0", [](TrainOptions& train) { train.eval_steps = -5; });
  const std::string budget = said([](TrainOptions& train) { train.activation_memory_budget = std::int64_t{1} << 44; });
  EXPECT_NE(budget.find("--activation_memory_budget = 17592186044416: 0"), std::string::npos) << budget;
  std::filesystem::remove_all(directory);
}

TEST(Options, LabelSmoothingIsAShareBelowOne) {
  const auto directory = fresh_directory("label_smoothing_share");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  for (const double good : {0.0, 0.1, 0.999}) {
    options.train.label_smoothing_factor = good;
    for (const char* command : {"train", "evaluate"}) EXPECT_NO_THROW(validate(options, command));
  }
  for (const double bad : {-0.1, 1.0, std::nan("")}) {
    options.train.label_smoothing_factor = bad;
    for (const char* command : {"train", "evaluate"}) {
      const std::string said = error_of(ErrorKind::config, [&] { validate(options, command); });
      const std::string wanted = fmt::format("--label_smoothing_factor = {}: a share from 0", bad);
      EXPECT_NE(said.find(wanted), std::string::npos) << said;
    }
  }
  std::filesystem::remove_all(directory);
}

TEST(Options, SharingFrozenWeightsIsForPlansThatKeepThem) {
  const auto directory = fresh_directory("share_frozen");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.share_frozen_weights = true;
  for (const char* plan : {"ddp", "zero1", "zero2"}) {
    options.train.sharding = plan;
    EXPECT_NO_THROW(validate(options, "train"));
  }
  for (const char* plan : {"zero3", "hsdp"}) {
    options.train.sharding = plan;
    const std::string said = error_of(ErrorKind::config, [&] { validate(options, "train"); });
    for (const std::string& word :
         {std::string("--share_frozen_weights = true"), std::string(plan), std::string("use ddp")})
      EXPECT_NE(said.find(word), std::string::npos) << said;
  }
  std::filesystem::remove_all(directory);
}

TEST(Options, EvaluatingNeedsAValidationFile) {
  const auto directory = fresh_directory("no_validation_file");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.data.validation_file.clear();
  EXPECT_NO_THROW(validate(options, "train"));
  options.train.eval_on_start = true;
  EXPECT_NE(error_of(ErrorKind::config, [&] { validate(options, "train"); }).find("eval_on_start"), std::string::npos);
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
