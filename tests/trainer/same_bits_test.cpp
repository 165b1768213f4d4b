// The promise of the project: the number of ranks, the plan and recomputation do not change a bit of the result.
#include <functional>
#include <map>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"

namespace shardtune {
namespace {

using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::sha256_of;
using testing_support::TinyFamily;
using testing_support::train_on_threads;

// Spoils the gradients that leave a rank: what a bug in the engine would do.
using Spoil = std::function<void(at::Tensor sent)>;

// The hash of the exported weights after training on thread ranks. With `spoil`, rank 1 has a bug.
std::string train(RunOptions options, int num_ranks, const std::string& name, const Spoil& spoil = {}) {
  options.train.output_dir += "_" + name;
  options.train.logging_strategy = Interval::no;
  return train_on_threads(options, num_ranks, [&spoil](int rank) {
    toy::CommunicatorHooks hooks;
    if (!spoil || rank != 1) return hooks;
    hooks.before = [&spoil](const std::string& operation, const at::Tensor& sent) {
      const bool is_reduction = operation == "all_to_all" || operation == "reduce_scatter";
      if (is_reduction && sent.numel() > 0 && sent.is_floating_point()) spoil(sent);
    };
    return hooks;
  });
}

void expect_one_hash(TinyFamily family, int accumulation, bool bf16) {
  const auto directory = fresh_directory(fmt::format("same_bits_{}_{}_{}", static_cast<int>(family), accumulation, bf16));
  RunOptions options = make_tiny_run(directory, family);
  options.train.max_steps = 50;
  options.train.global_batch_size = 4 * accumulation;
  options.train.bf16 = bf16;
  std::map<std::string, std::string> hashes;
  for (const int ranks : {1, 2, 3, 4, 5}) {
    for (const char* plan : {"ddp", "zero3"}) {
      for (const bool checkpointing : {false, true}) {
        options.train.sharding = plan;
        options.train.gradient_checkpointing = checkpointing;
        const std::string name = fmt::format("{}_{}_{}", plan, ranks, checkpointing);
        hashes[name] = train(options, ranks, name);
      }
    }
  }
  ASSERT_EQ(hashes.size(), 20U);
  for (const auto& [name, hash] : hashes) EXPECT_EQ(hash, hashes.begin()->second) << name;
  std::filesystem::remove_all(directory);
}

TEST(SameBits, BertFp32OneMicroBatch) { expect_one_hash(TinyFamily::bert, 1, false); }
TEST(SameBits, BertFp32Accumulation3) { expect_one_hash(TinyFamily::bert, 3, false); }
TEST(SameBits, BertBf16OneMicroBatch) { expect_one_hash(TinyFamily::bert, 1, true); }
TEST(SameBits, BertBf16Accumulation3) { expect_one_hash(TinyFamily::bert, 3, true); }
TEST(SameBits, LlamaFp32Accumulation3) { expect_one_hash(TinyFamily::llama, 3, false); }
TEST(SameBits, LlamaBf16Accumulation3) { expect_one_hash(TinyFamily::llama, 3, true); }

// The program under mpirun takes the same decisions as thread ranks: a covering subset of the above.
TEST(SameBits, UnderMpirun) {
  struct Case {
    int ranks;
    const char* plan;
    bool checkpointing;
    bool bf16;
  };
  const auto directory = fresh_directory("same_bits_mpirun");
  for (const bool bf16 : {false, true}) {
    RunOptions options = make_tiny_run(directory, TinyFamily::bert);
    options.train.max_steps = 50;
    options.train.global_batch_size = 12;
    options.train.bf16 = bf16;
    const std::string expected = train(options, 1, fmt::format("threads_{}", bf16));
    for (const Case& c : {Case{1, "zero3", true, false}, Case{2, "zero3", true, true}, Case{2, "ddp", false, false}, Case{3, "zero3", false, false},
                          Case{3, "ddp", true, true}, Case{4, "ddp", false, true}, Case{5, "zero3", true, true}, Case{5, "ddp", false, false}}) {
      if (c.bf16 != bf16) continue;
      const std::string output = fmt::format("{}/mpi_{}_{}_{}_{}", directory.string(), c.ranks, c.plan, c.checkpointing, bf16);
      const auto result = testing_support::run_command(fmt::format(
          "{} {} train --config_name {} --train_file {} --output_dir {} --sharding {} --gradient_checkpointing {} --bf16 {} "
          "--per_device_train_batch_size 4 --global_batch_size 12 --learning_rate 1e-3 --max_steps 50 --save_strategy no "
          "--num_threads 1 --disable_tqdm --log_level warn",
          testing_support::mpirun_command(c.ranks), testing_support::shardtune_binary(), options.model.config_name,
          options.data.train_file, output, c.plan, c.checkpointing, bf16));
      ASSERT_EQ(result.exit_code, 0) << result.output;
      EXPECT_EQ(sha256_of(output + "/model/model.safetensors"), expected) << output;
    }
  }
  std::filesystem::remove_all(directory);
}

// The comparisons above are worth nothing if they cannot fail.
TEST(SameBits, PlantedBugsGiveAnotherHash) {
  const auto directory = fresh_directory("same_bits_planted");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.global_batch_size = 12;
  for (const char* plan : {"ddp", "zero3"}) {
    options.train.sharding = plan;
    const auto name = [&](const char* bug) { return fmt::format("{}_{}", plan, bug); };
    const std::string expected = train(options, 2, name("none"));
    EXPECT_NE(train(options, 2, name("scale"), [](at::Tensor sent) { sent.mul_(1.0 + 1.0 / 128); }), expected) << plan;
    int calls = 0;
    const auto drop_one_slice = [&](at::Tensor sent) {
      if (++calls == 7) sent.narrow(0, 0, std::min<std::int64_t>(64, sent.numel())).zero_();
    };
    EXPECT_NE(train(options, 2, name("dropped"), drop_one_slice), expected) << plan;
    EXPECT_GE(calls, 7) << "the bug never struck";
  }
  std::filesystem::remove_all(directory);
}

// So must another seed.
TEST(SameBits, AnotherSeedGivesAnotherHash) {
  const auto directory = fresh_directory("same_bits_seed");
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  const std::string first = train(options, 1, "a");
  EXPECT_EQ(train(options, 1, "b"), first);
  options.train.seed = 43;
  EXPECT_NE(train(options, 1, "c"), first);
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
