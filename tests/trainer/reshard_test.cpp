// Whatever number of ranks, plan and precision: a run's state saved at N ranks is, loaded at M, the same bit for bit.
#include <map>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_reader.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "core/hash.hpp"
#include "core/log.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/support/tiny_run.hpp"
#include "tests/trainer/thread_run.hpp"
#include "trainer/build.hpp"
#include "trainer/checkpointing.hpp"
#include "trainer/optimizer.hpp"
#include "trainer/run_state.hpp"

namespace shardtune {
namespace {

namespace fs = std::filesystem;
using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::TinyFamily;
using testing_support::train_on_threads;

constexpr int kMostRanks = 8;
const std::vector<std::string> kLabels = {"class0", "class1", "class2"};

// A hash of every tensor (weights and both moments), and the run state: cursor, seeds, losses, schedule position.
struct Content {
  std::map<std::string, std::uint64_t> tensors;
  nlohmann::json state;
  bool operator==(const Content&) const = default;
};

Content content_of(const fs::path& checkpoint) {
  Content content;
  CheckpointReader reader(checkpoint);
  for (const ManifestTensor& tensor : reader.manifest().tensors) {
    const at::Tensor data = at::empty({tensor.numel()}, at::kFloat);
    reader.read({{&tensor, 0, data}});
    content.tensors[tensor.name + " " + tensor.field] = hash_bytes(data.data_ptr(), data.nbytes());
  }
  content.state = reader.manifest().run.at("state");
  content.state["identity"].erase("run_id");  // random
  return content;
}

// What differs, for people.
std::string difference(const Content& found, const Content& wanted) {
  if (found == wanted) return "";
  for (const auto& [name, hash] : wanted.tensors)
    if (!found.tensors.contains(name) || found.tensors.at(name) != hash) return name;
  return found.tensors.size() != wanted.tensors.size() ? "more tensors"
                                                       : nlohmann::json::diff(wanted.state, found.state).dump();
}

// Spoils what a rank has loaded: what a bug in loading would do.
using Spoil = std::function<void(int rank, const ParallelEngine& engine, Optimizer& optimizer)>;

// Loads a checkpoint into model, engine and optimizer at `num_ranks` and saves what is there then.
fs::path load_and_save(RunOptions options, const fs::path& from, int num_ranks, const fs::path& output_dir,
                       const Spoil& spoil = {}) {
  run_thread_ranks(num_ranks, [&](Communicator& world) {
    at::set_num_threads(1);
    ModelSource source = find_model_source(options.model);
    const std::unique_ptr<Model> model = build_model(source, options.model, kLabels);
    ParallelEngine engine(model->units(), world, parallel_options(options.train, world));
    Optimizer optimizer(engine, optimizer_settings(options.train));
    CheckpointStore store(output_dir, world, std::size_t{1} << 20, static_cast<int>(options.train.ranks_per_file));
    const nlohmann::json run = load_checkpoint(store, from, engine, &optimizer);
    const RunState state = RunState::from_json(run.at("state"), from.string());
    if (spoil) spoil(world.rank(), engine, optimizer);
    StateView view = make_state_view(engine, &optimizer);
    view.run = {{"step", state.step},
                {"run_id", state.identity.run_id},
                {"state", state.to_json()},
                {"environment", run.at("environment")}};
    store.save(state.step, view);
  });
  return output_dir / from.filename();
}

struct Precision {
  const char* name;
  bool bf16;
  const char* moments;
};

RunOptions options_for(const fs::path& directory, const char* plan, const Precision& precision) {
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.max_steps = 4;
  options.train.save_strategy = Interval::steps;
  options.train.save_steps = 1;
  options.train.global_batch_size = 12;
  options.train.learning_rate = 1e-2;
  options.train.logging_strategy = Interval::no;
  options.train.sharding = plan;
  options.train.bf16 = precision.bf16;
  options.train.adam_state_dtype = precision.moments;
  return options;
}

// N to M for all 64 pairs, and on from M to K, where the plan is another one and files are shared.
void expect_all_pairs(const char* plan, const Precision& precision) {
  log::set_level(log::Level::error);
  const auto directory = fresh_directory(fmt::format("reshard_{}_{}", plan, precision.name));
  RunOptions options = options_for(directory, plan, precision);
  RunOptions other = options;
  other.train.sharding = plan == std::string("ddp") ? "zero3" : "ddp";
  Content wanted;
  int pairs = 0;
  for (int saved = 1; saved <= kMostRanks; ++saved) {
    options.train.output_dir = directory / fmt::format("trained_{}", saved);
    options.train.max_steps = 2;
    train_on_threads(options, saved);
    const fs::path original = directory / fmt::format("trained_{}/checkpoint-2", saved);
    if (saved == 1) wanted = content_of(original);
    ASSERT_GT(wanted.tensors.size(), 3U * 20);
    ASSERT_EQ(difference(content_of(original), wanted), "") << "trained at " << saved;
    for (int loaded = 1; loaded <= kMostRanks; ++loaded, ++pairs) {
      const fs::path second =
          load_and_save(options, original, loaded, directory / fmt::format("m_{}_{}", saved, loaded));
      EXPECT_EQ(difference(content_of(second), wanted), "") << saved << " -> " << loaded;
      const int last = 1 + (3 * saved + loaded) % kMostRanks;
      other.train.ranks_per_file = 1 + loaded % 3;
      const fs::path third = load_and_save(other, second, last, directory / fmt::format("k_{}_{}", saved, loaded));
      EXPECT_EQ(difference(content_of(third), wanted), "") << saved << " -> " << loaded << " -> " << last;
      fs::remove_all(second.parent_path());
      fs::remove_all(third.parent_path());
    }
  }
  EXPECT_EQ(pairs, kMostRanks * kMostRanks);
  fs::remove_all(directory);
}

constexpr Precision kFp32{"fp32", false, "fp32"}, kBf16{"bf16", true, "fp32"},
    kBf16Moments{"bf16_moments", true, "bf16"};

TEST(Reshard, AllPairsDdpFp32) { expect_all_pairs("ddp", kFp32); }
TEST(Reshard, AllPairsDdpBf16) { expect_all_pairs("ddp", kBf16); }
TEST(Reshard, AllPairsZero3Fp32) { expect_all_pairs("zero3", kFp32); }
TEST(Reshard, AllPairsZero3Bf16) { expect_all_pairs("zero3", kBf16); }
TEST(Reshard, AllPairsZero3Bf16Moments) { expect_all_pairs("zero3", kBf16Moments); }

// One step at N ranks, one at M, one at K: what was loaded is also all that the next step depends on.
TEST(Reshard, ChainsOfTrainingEndAsTheUndisturbedRun) {
  log::set_level(log::Level::error);
  for (const Precision& precision : {kFp32, kBf16Moments}) {
    const auto directory = fresh_directory(fmt::format("reshard_chain_{}", precision.name));
    RunOptions options = options_for(directory, "ddp", precision);
    options.train.max_steps = 3;
    options.train.output_dir = directory / "undisturbed";
    train_on_threads(options, 1);
    const Content wanted = content_of(directory / "undisturbed/checkpoint-3");
    for (int first = 1; first <= kMostRanks; ++first) {
      const int chain[] = {first, 1 + (5 * first + 2) % kMostRanks, 1 + (3 * first + 4) % kMostRanks};
      options.train.output_dir = directory / "chain";
      options.train.resume_from_checkpoint.clear();
      for (int i = 0; i < 3; ++i) {
        options.train.sharding = (first + i) % 2 == 0 ? "ddp" : "zero3";
        train_on_threads(options, chain[i]);
        if (i == 2) break;
        // Back to where the next link begins.
        for (int step = i + 2; step <= 3; ++step) fs::remove_all(directory / fmt::format("chain/checkpoint-{}", step));
        options.train.resume_from_checkpoint = "true";
      }
      EXPECT_EQ(difference(content_of(directory / "chain/checkpoint-3"), wanted), "")
          << chain[0] << "," << chain[1] << "," << chain[2];
      fs::remove_all(directory / "chain");
    }
    fs::remove_all(directory);
  }
}

// The comparison is worth nothing if it cannot fail: one bit of one moment on one rank.
TEST(Reshard, OneBitThatIsLoadedWrongIsSeen) {
  log::set_level(log::Level::error);
  const auto directory = fresh_directory("reshard_planted");
  RunOptions options = options_for(directory, "zero3", kFp32);
  options.train.max_steps = 2;
  options.train.output_dir = directory / "trained";
  train_on_threads(options, 2);
  const fs::path original = directory / "trained/checkpoint-2";
  const Content wanted = content_of(original);
  const auto spoil = [](int rank, const ParallelEngine&, Optimizer& optimizer) {
    if (rank != 2) return;
    for (Optimizer::State& state : optimizer.states()) {
      const at::Tensor slice = state.parameter->slice_of(state.tensors.back());
      if (slice.numel() == 0) continue;
      *static_cast<std::uint32_t*>(slice.data_ptr()) ^= 1;
      return;
    }
  };
  EXPECT_NE(difference(content_of(load_and_save(options, original, 3, directory / "spoiled", spoil)), wanted), "");
  EXPECT_EQ(difference(content_of(load_and_save(options, original, 3, directory / "whole")), wanted), "");
  fs::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
