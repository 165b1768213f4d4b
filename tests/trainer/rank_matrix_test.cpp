// Every one of 1 to 5 ranks x ddp, zero3 x gradient checkpointing off, on x one and three micro-batches a step x fp32, bf16:
// 50 steps end with the same weights, bit for bit. (same_bits_test.cpp has the other plans, more ranks and mpirun.)
#include <filesystem>
#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"

namespace shardtune {
namespace {

using testing_support::TinyFamily;

void expect_one_hash(TinyFamily family, int num_micro_batches, bool bf16) {
  const auto directory = testing_support::fresh_directory(fmt::format("rank_matrix_{}_{}", num_micro_batches, bf16));
  RunOptions options = testing_support::make_tiny_run(directory, family);
  options.train.max_steps = 50;
  options.train.global_batch_size = 4 * num_micro_batches;
  options.train.bf16 = bf16;
  options.train.logging_strategy = Interval::no;
  const std::string base = options.train.output_dir;
  std::map<std::string, std::string> hashes;
  for (const int ranks : {1, 2, 3, 4, 5}) {
    for (const char* plan : {"ddp", "zero3"}) {
      for (const bool checkpointing : {false, true}) {
        options.train.sharding = plan;
        options.train.gradient_checkpointing = checkpointing;
        const std::string name = fmt::format("{}_{}_{}", plan, ranks, checkpointing);
        options.train.output_dir = base + name;
        hashes[name] = testing_support::train_on_threads(options, ranks);
      }
    }
  }
  ASSERT_EQ(hashes.size(), 20U);
  for (const auto& [name, hash] : hashes) EXPECT_EQ(hash, hashes.begin()->second) << name;
  std::filesystem::remove_all(directory);
}

TEST(RankMatrix, BertFp32OneMicroBatch) { expect_one_hash(TinyFamily::bert, 1, false); }
TEST(RankMatrix, BertFp32Accumulation3) { expect_one_hash(TinyFamily::bert, 3, false); }
TEST(RankMatrix, BertBf16OneMicroBatch) { expect_one_hash(TinyFamily::bert, 1, true); }
TEST(RankMatrix, BertBf16Accumulation3) { expect_one_hash(TinyFamily::bert, 3, true); }
TEST(RankMatrix, LlamaFp32Accumulation3) { expect_one_hash(TinyFamily::llama, 3, false); }
TEST(RankMatrix, LlamaBf16Accumulation3) { expect_one_hash(TinyFamily::llama, 3, true); }

}  // namespace
}  // namespace shardtune
