// The promise of the project: the number of ranks, the plan, recomputation and interruptions do not change a bit of the
// result. SHARDTUNE_SAME_BITS=full runs everything, with a model of the shape of MiniLM-L6; that takes an hour or two.
#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <map>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/instruction_set.hpp"
#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"

namespace shardtune {
namespace {

using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::resume_on_threads;
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

// Every plan at 1 to 8 ranks, or, without SHARDTUNE_SAME_BITS=full, a part of these that each group of the tests below
// chooses differently, so that together they have every plan and every number of ranks several times.
constexpr std::array kPlans{"ddp", "zero1", "zero2", "zero3", "hsdp"};
constexpr int kMaxRanks = 8;
constexpr int kNumCases = kMaxRanks * static_cast<int>(kPlans.size());

// SHARDTUNE_SAME_BITS=full: all cases of a group, two hours of one core for MiniLM; full:N: from case N on, where such
// a run was cut off (each case that is through has been said). -1: a part.
int first_full_case() {
  const char* wanted = std::getenv("SHARDTUNE_SAME_BITS");
  if (wanted == nullptr) return -1;
  if (std::string_view(wanted) == "full") return 0;
  int first = -1, end = 0;
  const bool is_number = std::sscanf(wanted, "full:%d%n", &first, &end) == 1 && wanted[end] == '\0';
  if (!is_number || first < 0 || first >= kNumCases)
    throw std::invalid_argument(
        fmt::format("SHARDTUNE_SAME_BITS is '{}': full or full:0 to full:{}", wanted, kNumCases - 1));
  return first;
}
bool is_full() { return first_full_case() >= 0; }

struct Case {
  int ranks;
  const char* plan;
};

std::vector<Case> cases_of_group(int group) {
  const int count = is_full() ? kNumCases : 4;
  std::vector<Case> cases;
  for (int i = std::max(0, first_full_case()); i < count; ++i) {
    const int index = (group * count + i) * 7 % kNumCases;  // 7 has no factor in common with 40: all are different
    cases.push_back({index % kMaxRanks + 1, kPlans[static_cast<std::size_t>(index / kMaxRanks)]});
  }
  return cases;
}

void set_case(RunOptions& options, const Case& c) {
  options.train.sharding = c.plan;
  options.train.hsdp_shard_size = 0;
  if (c.plan == std::string_view("hsdp")) options.train.hsdp_shard_size = c.ranks % 2 == 0 ? c.ranks / 2 : 1;
  options.train.gradient_checkpointing = c.ranks % 2 == 0;
}

// 100 steps of a number of micro-batches that hardly any number of ranks divides; interrupted at step 37, too, and
// continued by the ranks and the plan of the next case.
void expect_one_hash(TinyFamily family, bool bf16, int group) {
  const auto directory = fresh_directory(fmt::format("same_bits_{}", group));
  RunOptions options = make_tiny_run(directory, family);
  options.train.max_steps = 100;
  options.train.per_device_train_batch_size = 2;
  options.train.global_batch_size = is_full() ? 22 : 10;
  options.train.bf16 = bf16;
  options.train.save_strategy = Interval::steps;
  options.train.save_steps = 37;
  const std::string base = options.train.output_dir;
  const std::string wanted = train(options, 1, "reference");
  std::string interrupted = base + "_reference";
  int number = std::max(0, first_full_case());
  for (const Case& c : cases_of_group(group)) {
    set_case(options, c);
    const std::string name = fmt::format("{}_{}", c.plan, c.ranks);
    options.train.output_dir = base;
    const std::string trained = train(options, c.ranks, name);
    EXPECT_EQ(trained, wanted) << name;
    options.train.output_dir = interrupted;
    const std::string resumed = is_full() || number % 2 == 1 ? resume_on_threads(options, c.ranks, 37) : wanted;
    EXPECT_EQ(resumed, wanted) << interrupted << " resumed by " << name;
    if (is_full()) fmt::print("case {}, {}: hashes {}, resumed {}\n", number, name, trained, resumed);
    ++number;
    std::filesystem::remove_all(interrupted);
    interrupted = base + "_" + name;
  }
  std::filesystem::remove_all(directory);
}

TinyFamily bert_family() { return is_full() ? TinyFamily::minilm : TinyFamily::bert; }

TEST(SameBits, BertFp32) { expect_one_hash(bert_family(), false, 0); }
TEST(SameBits, BertBf16) { expect_one_hash(bert_family(), true, 1); }
TEST(SameBits, LlamaFp32) { expect_one_hash(TinyFamily::llama, false, 2); }
TEST(SameBits, LlamaBf16) { expect_one_hash(TinyFamily::llama, true, 3); }

TEST(SameBits, TheCasesTogetherHaveEveryPlanAndEveryNumberOfRanks) {
  std::map<std::string, int> seen;
  for (int group = 0; group < 4; ++group) {
    for (const Case& c : cases_of_group(group)) {
      ++seen[c.plan];
      ++seen[std::to_string(c.ranks)];
    }
  }
  EXPECT_EQ(seen.size(), kPlans.size() + kMaxRanks);
  for (const auto& [what, count] : seen) EXPECT_GE(count, 2) << what;
}

// One micro-batch a step: all ranks but one have none.
TEST(SameBits, OneMicroBatch) {
  const auto directory = fresh_directory("same_bits_one");
  for (const bool bf16 : {false, true}) {
    RunOptions options = make_tiny_run(directory, TinyFamily::bert);
    options.train.max_steps = 25;
    options.train.bf16 = bf16;
    const std::string wanted = train(options, 1, fmt::format("one_{}", bf16));
    for (const Case& c : {Case{2, "zero3"}, Case{3, "ddp"}, Case{4, "hsdp"}, Case{5, "zero2"}, Case{5, "zero1"}}) {
      set_case(options, c);
      EXPECT_EQ(train(options, c.ranks, fmt::format("{}_{}_{}", c.plan, c.ranks, bf16)), wanted) << c.plan << c.ranks;
    }
  }
  std::filesystem::remove_all(directory);
}

// Without MKL's strict mode, which on Intel's processors the program asks for itself and this process does not
// (kernels/matrix_product.hpp). Elsewhere any mode would make MKL take other instructions than without.
const char* without_strict_mode() { return is_intel_processor() ? "MKL_CBWR=AUTO" : ""; }

// The program under mpirun takes the same decisions as thread ranks: a covering subset of the above.
TEST(SameBits, UnderMpirun) {
  struct MpiCase {
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
    for (const MpiCase& c :
         {MpiCase{1, "zero3", true, false}, MpiCase{2, "zero3", true, true}, MpiCase{2, "ddp", false, false},
          MpiCase{3, "zero3", false, false}, MpiCase{3, "ddp", true, true}, MpiCase{4, "ddp", false, true},
          MpiCase{5, "zero3", true, true}, MpiCase{5, "ddp", false, false}}) {
      if (c.bf16 != bf16) continue;
      const std::string output =
          fmt::format("{}/mpi_{}_{}_{}_{}", directory.string(), c.ranks, c.plan, c.checkpointing, bf16);
      const auto result = testing_support::run_command(fmt::format(
          "{} {} {} train --config_name {} --train_file {} --output_dir {} --sharding {} "
          "--gradient_checkpointing {} --bf16 {} "
          "--per_device_train_batch_size 4 --global_batch_size 12 --learning_rate 1e-3 --max_steps 50 "
          "--save_strategy no "
          "--num_threads 1 --disable_tqdm --log_level warn",
          without_strict_mode(), testing_support::mpirun_command(c.ranks), testing_support::shardtune_binary(),
          options.model.config_name, options.data.train_file, output, c.plan, c.checkpointing, bf16));
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
