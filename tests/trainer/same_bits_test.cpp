// The promise of the project: the number of ranks, the plan and recomputation do not change a bit of the result.
#include <map>

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "distributed/comm/thread_group.hpp"
#include "tests/support/tiny_run.hpp"
#include "trainer/commands.hpp"

namespace shardtune {
namespace {

using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::sha256_of;
using testing_support::TinyFamily;

std::string train(RunOptions options, int num_ranks, const std::string& name) {
  options.train.output_dir += "_" + name;
  run_thread_ranks(num_ranks, [&](Communicator& world) {
    at::set_num_threads(1);
    EXPECT_EQ(run_train(options, world), 0);
  });
  return sha256_of(options.train.output_dir + "/model/model.safetensors");
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

// The comparison above is worth nothing if it cannot fail: another seed must give another hash.
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
