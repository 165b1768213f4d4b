// Saving while training goes on: the same checkpoints as saving in between, and what a failed save means for the run.
#include <algorithm>
#include <condition_variable>
#include <cstdlib>
#include <fstream>
#include <map>
#include <mutex>
#include <thread>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_reader.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/safetensors.hpp"
#include "checkpoint/tools.hpp"
#include "core/error.hpp"
#include "core/hash.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/support/tiny_run.hpp"
#include "trainer/commands.hpp"
#include "trainer/saver.hpp"

namespace shardtune {
namespace {

using testing_support::fresh_directory;
using testing_support::make_tiny_run;
using testing_support::TinyFamily;

int train(const RunOptions& options, int num_ranks) {
  std::mutex mutex;
  std::vector<int> codes;
  run_thread_ranks(num_ranks, [&](Communicator& world) {
    at::set_num_threads(1);
    const int code = run_train(options, world);
    const std::lock_guard lock(mutex);
    codes.push_back(code);
  });
  EXPECT_EQ(std::count(codes.begin(), codes.end(), codes.front()), num_ranks);
  return codes.front();
}

// A hash of every tensor of every checkpoint in the directory.
std::map<std::string, std::uint64_t> tensor_hashes(const std::string& output_dir) {
  std::map<std::string, std::uint64_t> hashes;
  for (const CheckpointInfo& info : list_checkpoints(output_dir)) {
    EXPECT_TRUE(verify_checkpoint(info.directory).empty()) << info.directory;
    CheckpointReader reader(info.directory);
    for (const ManifestTensor& tensor : reader.manifest().tensors) {
      const at::Tensor data = at::empty({tensor.numel()}, at::kFloat);
      reader.read({{&tensor, 0, data}});
      hashes[fmt::format("{} {} {}", info.step, tensor.name, tensor.field)] = hash_bytes(data.data_ptr(), data.nbytes());
    }
  }
  return hashes;
}

RunOptions save_often(const std::filesystem::path& directory) {
  RunOptions options = make_tiny_run(directory, TinyFamily::bert);
  options.train.max_steps = 9;
  options.train.save_strategy = Interval::steps;
  options.train.save_steps = 2;
  options.train.learning_rate = 1e-2;
  options.train.global_batch_size = 12;
  return options;
}

// The writer is slowed down, so that it takes most of the state after training has changed it.
TEST(AsyncSave, GivesTheSameCheckpointsAsSavingInBetween) {
  for (const char* plan : {"ddp", "zero3"}) {
    const auto directory = fresh_directory(fmt::format("async_save_{}", plan));
    RunOptions options = save_often(directory);
    options.train.sharding = plan;
    options.train.async_save = false;
    options.train.output_dir = (directory / "between").string();
    EXPECT_EQ(train(options, 2), 0);
    options.train.async_save = true;
    options.train.checkpoint_staging_mb = 1;
    options.train.output_dir = (directory / "background").string();
    set_save_phase_hook([](const char* phase, std::int64_t) {
      if (std::string_view(phase) == "shard_created" || std::string_view(phase) == "dataset_written")
        std::this_thread::sleep_for(std::chrono::milliseconds(1));
    });
    EXPECT_EQ(train(options, 3), 0);
    set_save_phase_hook(nullptr);
    const auto expected = tensor_hashes((directory / "between").string());
    EXPECT_GT(expected.size(), 5u * 20);
    EXPECT_EQ(tensor_hashes(options.train.output_dir), expected);
    // Worth something only if the steps differ.
    const std::string first = expected.begin()->first;
    const std::string name = first.substr(first.find(' '));
    EXPECT_NE(expected.at("2" + name), expected.at("4" + name));
    std::filesystem::remove_all(directory);
  }
}

// A writer that is slower than training: what is due meanwhile is left out, but never the end or the best step.
TEST(OverlappingSaves, AreLeftOutWhereAskedTo) {
  const auto directory = fresh_directory("overlapping_saves");
  RunOptions options = save_often(directory);
  options.train.save_steps = 1;
  options.train.on_save_overlap = "skip";
  std::mutex mutex;
  std::condition_variable changed;
  bool may_go_on = false;
  set_save_phase_hook([&](const char* phase, std::int64_t step) {
    const std::string_view name(phase);
    std::unique_lock lock(mutex);
    // The first save is held until the one of the end is due, which waits for it.
    if (name == "shard_created" && step == 1) changed.wait_for(lock, std::chrono::seconds(60), [&] { return may_go_on; });
  });
  std::thread releaser([&] {
    // Training does not wait for the writer, so the metrics of the last step appear while it is held.
    const auto metrics = std::filesystem::path(options.train.output_dir) / "metrics.jsonl";
    for (int i = 0; i < 6000; ++i) {
      std::ifstream in(metrics);
      const std::string text((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
      if (text.find("\"step\":9") != std::string::npos || text.find("\"step\": 9") != std::string::npos) break;
      std::this_thread::sleep_for(std::chrono::milliseconds(10));
    }
    const std::lock_guard lock(mutex);
    may_go_on = true;
    changed.notify_all();
  });
  EXPECT_EQ(train(options, 2), 0);
  releaser.join();
  set_save_phase_hook(nullptr);
  std::vector<std::int64_t> steps;
  for (const CheckpointInfo& info : list_checkpoints(options.train.output_dir)) steps.push_back(info.step);
  EXPECT_EQ(steps, (std::vector<std::int64_t>{9, 1}));
  std::filesystem::remove_all(directory);
}

// Fails the save of one step on one rank.
void fail_save_of(std::int64_t step) {
  set_save_phase_hook([step](const char* phase, std::int64_t now) {
    if (now == step && std::string_view(phase) == "shard_created") fail(ErrorKind::io, "injected");
  });
}

TEST(FailedSave, TheRunGoesOnAndTheNextSaveIsTried) {
  for (const bool in_background : {true, false}) {
    const auto directory = fresh_directory("failed_save");
    RunOptions options = save_often(directory);
    options.train.async_save = in_background;
    fail_save_of(4);
    EXPECT_EQ(train(options, 2), 0);
    set_save_phase_hook(nullptr);
    std::vector<std::int64_t> steps;
    for (const CheckpointInfo& info : list_checkpoints(options.train.output_dir)) steps.push_back(info.step);
    EXPECT_EQ(steps, (std::vector<std::int64_t>{9, 8, 6, 2})) << in_background;
    std::filesystem::remove_all(directory);
  }
}

TEST(FailedSave, TheLastOneIsExitCode4WithTheModelExported) {
  const auto directory = fresh_directory("failed_last_save");
  RunOptions options = save_often(directory);
  fail_save_of(9);
  EXPECT_EQ(train(options, 2), exit_code(ErrorKind::io));
  set_save_phase_hook(nullptr);
  EXPECT_EQ(list_checkpoints(options.train.output_dir).front().step, 8);
  EXPECT_TRUE(std::filesystem::exists(std::filesystem::path(options.train.output_dir) / "model/model.safetensors"));
  std::filesystem::remove_all(directory);
}

TEST(FailedSave, EndsTheRunWhereAskedTo) {
  const auto directory = fresh_directory("failed_save_stops");
  RunOptions options = save_often(directory);
  options.train.on_save_error = "stop";
  fail_save_of(4);
  try {
    train(options, 2);
    ADD_FAILURE() << "the run went on";
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::io);
    EXPECT_NE(std::string(e.what()).find("checkpoint-4"), std::string::npos) << e.what();
  }
  set_save_phase_hook(nullptr);
  EXPECT_EQ(list_checkpoints(options.train.output_dir).front().step, 2);
  std::filesystem::remove_all(directory);
}

std::vector<std::int64_t> steps_in(const std::string& output_dir) {
  std::vector<std::int64_t> steps;
  for (const CheckpointInfo& info : list_checkpoints(output_dir)) steps.push_back(info.step);
  return steps;
}

TEST(FailedSave, OfABetterModelLeavesTheBestOneThatWasSaved) {
  const auto directory = fresh_directory("failed_best_unit");
  const auto comm = make_self_communicator();
  CheckpointStore store(directory, *comm);
  const at::Tensor weight = at::zeros({5});
  Saver saver(store, {.in_background = false, .keep = 1}, [&](const RunState& state) {
    StateView view;
    view.slices.push_back({"w", "value", {5}, 0, weight});
    view.run = {{"step", state.step}};
    return view;
  });
  const auto save = [&](std::int64_t step, std::int64_t best_step) {
    RunState state;
    state.step = step, state.best_step = best_step;
    saver.save(state, true);
    return steps_in(directory.string());
  };
  using Steps = std::vector<std::int64_t>;
  EXPECT_EQ(save(2, 2), (Steps{2}));
  fail_save_of(4);
  EXPECT_EQ(save(4, 4), (Steps{2}));
  set_save_phase_hook(nullptr);
  EXPECT_EQ(save(6, 4), (Steps{6, 2}));
  EXPECT_EQ(save(8, 4), (Steps{8, 2}));
  EXPECT_EQ(saver.saved_best_step(), 2);
  EXPECT_EQ(save(10, 10), (Steps{10}));
  EXPECT_EQ(save(12, 10), (Steps{12, 10}));
  std::filesystem::remove_all(directory);
}

// The evaluations get better from step to step, and only the first best model can be saved.
TEST(FailedSave, OfTheBestModelExportsTheBestOneThatWasSavedAndIsExitCode4) {
  const auto directory = fresh_directory("failed_best");
  RunOptions options = save_often(directory);
  options.train.learning_rate = 1e-3;
  options.train.eval_strategy = Interval::steps;
  options.train.eval_steps = 2;
  options.train.load_best_model_at_end = true;
  options.train.metric_for_best_model = "eval_loss";
  options.train.save_total_limit = 1;
  set_save_phase_hook([](const char* phase, std::int64_t step) {
    if (step > 2 && step < 9 && std::string_view(phase) == "shard_created") fail(ErrorKind::io, "injected");
  });
  EXPECT_EQ(train(options, 2), exit_code(ErrorKind::io));
  set_save_phase_hook(nullptr);
  EXPECT_EQ(steps_in(options.train.output_dir), (std::vector<std::int64_t>{9, 2}));
  const std::filesystem::path out = options.train.output_dir;
  std::ifstream state(out / "checkpoint-9/trainer_state.json");
  ASSERT_GT(nlohmann::json::parse(state)["best_global_step"].get<int>(), 2) << "the test tests nothing";
  export_safetensors(out / "checkpoint-2", directory / "expected", {});
  std::map<std::string, std::uint64_t> hashes[2];
  for (const int i : {0, 1})
    for (const auto& [name, entry] : read_model_headers(i == 0 ? directory / "expected" : out / "model")) {
      const at::Tensor data = at::empty(entry.shape, at::kFloat);
      read_safetensors_slice(entry, 0, data.view({-1}));
      hashes[i][name] = hash_bytes(data.data_ptr(), data.nbytes());
    }
  EXPECT_GT(hashes[0].size(), 20u);
  EXPECT_EQ(hashes[0], hashes[1]);
  std::filesystem::remove_all(directory);
}

// A run as the first version saved it after two steps (CONTRIBUTING.md says how). What RunState and RunIdentity read
// besides, since then, must have a default where this checkpoint has nothing.
TEST(GoldenRun, GoesOnWithAllItsState) {
  const auto directory = fresh_directory("golden_run");
  std::filesystem::copy(std::filesystem::path(std::getenv("SHARDTUNE_SOURCE_DIR")) / "tests/golden/trainer_checkpoint",
                        directory, std::filesystem::copy_options::recursive);
  const std::filesystem::path out = directory / "run";
  RunOptions options;
  options.model.config_name = (directory / "model").string();
  options.data.train_file = (directory / "train.jsonl").string();
  options.train.output_dir = out.string();
  options.train.resume_from_checkpoint = "true";
  options.train.max_steps = 3;
  options.train.learning_rate = 1e-2;
  options.train.disable_tqdm = true;
  options.train.log_level = "error";
  const nlohmann::json before = read_checkpoint_run_state(out / "checkpoint-2").at("state");
  EXPECT_EQ(train(options, 3), 0);
  const nlohmann::json after = read_checkpoint_run_state(out / "checkpoint-3").at("state");
  nlohmann::json identity = before.at("identity");
  identity["label_smoothing_factor"] = 0.0;  // came later
  EXPECT_EQ(after.at("identity"), identity);
  EXPECT_EQ(after.at("step"), 3);
  EXPECT_EQ(after.at("cursor"), nlohmann::json({{"epoch", 1}, {"step_in_epoch", 1}}));
  EXPECT_EQ(after.at("samples_seen"), before.at("samples_seen").get<int>() + 4);
  for (const char* key : {"best_step", "best_metric"}) EXPECT_EQ(after.at(key), before.at(key));
  for (std::size_t i = 0; i < before.at("log_history").size(); ++i)
    EXPECT_EQ(after.at("log_history").at(i), before.at("log_history").at(i));
  // The moments went on from those of the checkpoint: the second ones have decayed, not begun again at zero.
  const auto hashes = tensor_hashes(out.string());
  EXPECT_NE(hashes.at("3 classifier.weight exp_avg_sq"), hashes.at("2 classifier.weight exp_avg_sq"));
  CheckpointReader old(out / "checkpoint-2"), now(out / "checkpoint-3");
  const ManifestTensor &tensor = old.tensor("classifier.weight", "exp_avg_sq"),
                       &same = now.tensor("classifier.weight", "exp_avg_sq");
  const at::Tensor a = at::empty({tensor.numel()}, at::kFloat), b = at::empty({tensor.numel()}, at::kFloat);
  old.read({{&tensor, 0, a}});
  now.read({{&same, 0, b}});
  EXPECT_TRUE((b >= 0.998 * a).all().item<bool>());
  EXPECT_GT(a.min().item<float>(), 0);
  std::filesystem::remove_all(directory);
}

}  // namespace
}  // namespace shardtune
