// fp16 with its loss scale, bf16 moments and bf16 reduction through whole runs: the same bits at any rank count, through
// a checkpoint, and when gradients overflow.
#include <cstdlib>
#include <limits>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"

namespace shardtune {
#include "tests/support/error_of.hpp"
namespace {

namespace fs = std::filesystem;
using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::MakeHooks;
using testing_support::resume_on_threads;
using testing_support::sha256_of;
using testing_support::TinyFamily;
using testing_support::error_of;
using testing_support::train_on_threads;

// These tests are about bits and loss scales, on any processor.
void emulate_fp16() { ::setenv("SHARDTUNE_EMULATE_FP16", "1", 1); }

RunOptions tiny_options(const fs::path& directory, TinyFamily family) {
  RunOptions options = make_tiny_run(directory, family);
  options.train.max_steps = 6;
  options.train.save_strategy = Interval::steps;
  options.train.save_steps = 3;
  options.train.global_batch_size = 12;
  options.train.logging_strategy = Interval::no;
  return options;
}

void expect_one_hash(const std::string& name, const std::function<void(TrainOptions&)>& adjust) {
  for (const TinyFamily family : {TinyFamily::bert, TinyFamily::llama}) {
    const auto directory = fresh_directory(fmt::format("precision_{}_{}", name, static_cast<int>(family)));
    RunOptions options = tiny_options(directory, family);
    adjust(options.train);
    options.train.output_dir = directory / "reference";
    const std::string wanted = train_on_threads(options, 1);
    EXPECT_EQ(resume_on_threads(options, 3, 3), wanted) << name;
    for (const char* plan : {"ddp", "zero1", "zero2", "zero3", "hsdp"}) {
      options.train.sharding = plan;
      options.train.hsdp_shard_size = plan == std::string("hsdp") ? 2 : 0;
      options.train.output_dir = directory / plan;
      EXPECT_EQ(train_on_threads(options, 4), wanted) << name << " " << plan;
    }
    fs::remove_all(directory);
  }
}

TEST(Precision, Fp16HasOneHash) {
  emulate_fp16();
  expect_one_hash("fp16", [](TrainOptions& train) { train.fp16 = true; });
}

TEST(Precision, Bf16MomentsAndReductionHaveOneHash) {
  expect_one_hash("bf16", [](TrainOptions& train) {
    train.bf16 = true;
    train.adam_state_dtype = "bf16";
    train.reduce_dtype = "bf16";
    train.gradient_checkpointing = true;
    train.gradient_checkpointing_mode = "selective";
  });
}

// Makes one exchange of gradients on rank 1 bring an infinity.
MakeHooks overflow_once() {
  return [](int rank) {
    toy::CommunicatorHooks hooks;
    auto num_seen = std::make_shared<int>(0);
    hooks.after = [rank, num_seen](const std::string& operation, const at::Tensor& out) {
      if (rank != 1 || operation != "all_to_all" || out.numel() == 0 || ++*num_seen != 7) return;
      out[out.numel() - 1] = std::numeric_limits<float>::infinity();
    };
    return hooks;
  };
}

TEST(Precision, AnOverflowOnOneRankIsSkippedByAllAndHalvesTheScale) {
  emulate_fp16();
  for (const char* plan : {"ddp", "zero3"}) {
    const auto directory = fresh_directory(fmt::format("overflow_{}", plan));
    RunOptions options = tiny_options(directory, TinyFamily::bert);
    options.train.fp16 = true;
    options.train.sharding = plan;
    options.train.output_dir = directory / "plain";
    const std::string undisturbed = train_on_threads(options, 2);
    const nlohmann::json before = read_checkpoint_run_state(directory / "plain/checkpoint-6").at("state");
    options.train.output_dir = directory / "disturbed";
    EXPECT_NE(train_on_threads(options, 2, overflow_once()), undisturbed);
    const nlohmann::json after = read_checkpoint_run_state(directory / "disturbed/checkpoint-6").at("state");
    EXPECT_EQ(after.at("skipped_steps"), before.at("skipped_steps").get<int>() + 1) << plan;
    EXPECT_EQ(after.at("loss_scale"), before.at("loss_scale").get<double>() / 2) << plan;
    EXPECT_EQ(after.at("step"), 6) << plan;
    // The loss scale and the count of skipped steps are part of the run: resumed on another number of ranks it ends alike.
    const std::string disturbed = sha256_of(directory / "disturbed/model/model.safetensors");
    EXPECT_EQ(resume_on_threads(options, 3, 3), disturbed) << plan;
    fs::remove_all(directory);
  }
}

TEST(Precision, TheSameInfinityEndsARunThatHasNoLossScale) {
  const auto directory = fresh_directory("overflow_fp32");
  RunOptions options = tiny_options(directory, TinyFamily::bert);
  const auto said = [&] {
    return error_of(ErrorKind::numeric, [&] { train_on_threads(options, 2, overflow_once()); });
  };
  const std::string in_fp32 = said();
  EXPECT_NE(in_fp32.find("lower --learning_rate or check the data"), std::string::npos) << in_fp32;
  EXPECT_EQ(in_fp32.find("--bf16"), std::string::npos) << in_fp32;
  options.train.bf16 = true;
  options.train.overwrite_output_dir = true;
  EXPECT_NE(said().find("train without --bf16"), std::string::npos);
  fs::remove_all(directory);
}

TEST(FastReduction, GivesTheSameBitsAgainAndResumesOnOtherRanks) {
  const auto directory = fresh_directory("fast");
  RunOptions options = tiny_options(directory, TinyFamily::llama);
  options.train.global_batch_size = 20;  // five micro-batches: sums of fewer have the order of the tree by chance
  options.train.output_dir = directory / "tree";
  const std::string tree = train_on_threads(options, 3);
  options.train.reduction = "fast";
  for (const char* plan : {"ddp", "zero1", "zero2", "zero3", "hsdp"}) {
    options.train.sharding = plan;
    options.train.hsdp_shard_size = plan == std::string("hsdp") ? 1 : 0;
    options.train.output_dir = directory / plan;
    const std::string fast = train_on_threads(options, 3);
    EXPECT_NE(fast, tree) << plan << " added in the order of the tree";
    EXPECT_EQ(resume_on_threads(options, 3, 3), fast) << plan;
    EXPECT_NE(resume_on_threads(options, 2, 3), fast) << plan << ": accepted, but bits are not promised";
  }
  fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
