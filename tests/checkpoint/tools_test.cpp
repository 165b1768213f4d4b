// The offline tools: what they write loads with the right bits, what they refuse is named, and nothing good is deleted.
#include <csignal>
#include <cstring>

#include <fstream>
#include <optional>
#include <thread>

#include <ATen/ATen.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_reader.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/output_lock.hpp"
#include "checkpoint/safetensors.hpp"
#include "checkpoint/tools.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"
#include "tests/support/error_of.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;
using testing_support::error_of;

const std::vector<TestTensor> kTensors = test_tensors(3000);  // the largest spans several pieces

fs::path save_at(const fs::path& dir, std::int64_t step, int num_ranks, std::int64_t content_of_step = -1) {
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    StateView view = expected_state(kTensors, content_of_step < 0 ? step : content_of_step, comm.rank(), comm.size());
    CheckpointStore(dir, comm).save(step, view);
  });
  return dir / fmt::format("checkpoint-{}", step);
}

std::string load_at(const fs::path& checkpoint, std::int64_t step, int num_ranks) {
  std::string said;
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    StateView view = blank_state(kTensors, comm.rank(), comm.size());
    const auto run = CheckpointStore(checkpoint.parent_path(), comm).load(checkpoint, view);
    std::string mine = difference(view, kTensors, step, comm.rank(), comm.size());
    if (run != expected_state(kTensors, step, 0, 1).run) mine += " run state";
    if (comm.rank() == 0 || !mine.empty()) said = mine;
  });
  return said;
}

TEST(Reshard, AnyNumberOfFilesHoldsTheSameState) {
  TempDir dir;
  const fs::path original = save_at(dir / "a", 5, 3);
  fs::path last = original;
  for (const int shards : {1, 7, 2}) {  // a chain
    last = reshard_checkpoint(last, dir / fmt::format("to{}", shards), shards);
    EXPECT_EQ(last.filename(), "checkpoint-5");
    EXPECT_TRUE(verify_checkpoint(last).empty());
    EXPECT_EQ(read_manifest(last).num_ranks, shards);
    EXPECT_EQ(load_at(last, 5, 3), "");
    EXPECT_EQ(read_file(last / "tokenizer.json"), read_file(original / "tokenizer.json"));
    EXPECT_TRUE(diff_checkpoints(original, last)["equal"].get<bool>());
  }
  EXPECT_NE(error_of(ErrorKind::config, [&] { reshard_checkpoint(original, dir / "to1", 2); }).find("exists already"),
            std::string::npos);
}

TEST(Export, ThatFailsLeavesNoPartOfAModel) {
  TempDir dir;
  const fs::path checkpoint = save_at(dir / "a", 5, 2);
  // The directory stands where a file has to go: the configuration, then the last of the numbered parts.
  for (const char* name : {"config.json.tmp", "model-00003-of-00003.safetensors.tmp"}) {
    const fs::path model = dir / "model";
    fs::create_directories(model / name);
    error_of(ErrorKind::io, [&] { export_safetensors(checkpoint, model, {.max_shard_bytes = 2'000'000}); });
    for (const auto& entry : fs::directory_iterator(model)) EXPECT_EQ(entry.path().filename(), name);
    fs::remove_all(model);
  }
}

TEST(CheckpointReader, ReadsMoreFilesThanAProcessMayHaveOpen) {
  TempDir dir;
  const fs::path original = save_at(dir / "a", 5, 1);
  const fs::path many = reshard_checkpoint(original, dir / "many", 70);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_NOFILE, &before), 0);
  const rlimit low{64, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &low), 0);
  EXPECT_TRUE(diff_checkpoints(original, many)["equal"].get<bool>());
  CheckpointReader reader(many);
  std::uint64_t bytes = 0;
  for (const ManifestTensor& tensor : reader.manifest().tensors) {
    const at::Tensor whole = at::empty({tensor.numel()}, at::kFloat);
    reader.read({{&tensor, 0, whole}});
    bytes += whole.nbytes();
  }
  ASSERT_EQ(::setrlimit(RLIMIT_NOFILE, &before), 0);
  EXPECT_EQ(reader.num_open(), 8u);
  EXPECT_GE(reader.bytes_read(), bytes);
}

TEST(Reshard, DamageIsRefusedAndLeavesNothing) {
  TempDir dir;
  const fs::path original = save_at(dir / "a", 5, 2);
  std::fstream(original / "shard-00001-of-00002.h5", std::ios::in | std::ios::out).seekp(50'000) << "x";
  EXPECT_NE(error_of(ErrorKind::data, [&] { reshard_checkpoint(original, dir / "b", 3); }).find("shard-00001"),
            std::string::npos);
  for (const auto& entry : fs::directory_iterator(dir / "b")) EXPECT_EQ(entry.path().filename(), "shardtune.lock");
}

// As tools.hpp promises; and a checkpoint of an older step is not the newest.
TEST(Reshard, ADirectoryInUseIsRefusedAndLatestNeverGoesBack) {
  TempDir dir;
  const fs::path five = save_at(dir / "a", 5, 2), four = save_at(dir / "b", 4, 2);
  {
    const OutputLock job(dir / "b", "train", 0);
    const std::string said = error_of(ErrorKind::config, [&] { reshard_checkpoint(five, dir / "b", 1); });
    EXPECT_NE(said.find("in use by another job (train"), std::string::npos) << said;
    EXPECT_FALSE(fs::exists(dir / "b/checkpoint-5"));
    EXPECT_FALSE(fs::exists(dir / "b/checkpoint-5.partial"));
    export_safetensors(five, dir / "model", {});
    EXPECT_NE(error_of(ErrorKind::config, [&] { import_model(dir / "model", dir / "b"); }).find("in use"),
              std::string::npos);
  }
  reshard_checkpoint(four, dir / "a", 1);
  EXPECT_EQ(read_file(dir / "a/latest"), "checkpoint-5\n");
  reshard_checkpoint(five, dir / "b", 1);
  EXPECT_EQ(read_file(dir / "b/latest"), "checkpoint-5\n");
}

TEST(Diff, NamesWhatDiffersAndHowFar) {
  TempDir dir;
  const fs::path a = save_at(dir / "a", 5, 2), same = save_at(dir / "b", 5, 3), other = save_at(dir / "c", 5, 2, 6);
  EXPECT_TRUE(diff_checkpoints(a, same)["equal"].get<bool>());
  const nlohmann::json different = diff_checkpoints(a, other);
  EXPECT_FALSE(different["equal"].get<bool>());
  EXPECT_EQ(different["tensors"].size(), 3 * (kTensors.size() - 2) + 1);  // one has only a value, one no elements
  EXPECT_EQ(different["run"].size(), 3u) << different["run"];

  // One element of one tensor.
  const auto save_value = [&](const fs::path& out, double value, std::vector<std::int64_t> shape) {
    const auto comm = make_self_communicator();
    StateView view;
    at::Tensor data = at::zeros({600'000}, at::kFloat);
    data[500'000] = value;
    view.slices.push_back({"x", "value", std::move(shape), 0, data});
    view.run = nlohmann::json::object();
    CheckpointStore(out, *comm).save(1, view);
    return out / "checkpoint-1";
  };
  const fs::path zero = save_value(dir / "zero", 0, {600'000}), quarter = save_value(dir / "quarter", 0.25, {600'000});
  EXPECT_EQ(
      diff_checkpoints(zero, quarter)["tensors"],
      nlohmann::json::parse(
          R"([{"name":"x","field":"value","num_different":1,"first_different":500000,"max_abs_difference":0.25}])"));
  EXPECT_EQ(diff_checkpoints(zero, save_value(dir / "square", 0, {600, 1000}))["tensors"][0]["shape_b"],
            nlohmann::json({600, 1000}));
  EXPECT_EQ(diff_checkpoints(zero, a)["only_in_a"], nlohmann::json({"x value"}));
}

TEST(Export, SafetensorsHoldTheValuesInOneOrSeveralFiles) {
  TempDir dir;
  const fs::path checkpoint = save_at(dir / "a", 5, 3);
  export_safetensors(checkpoint, dir / "one", {});
  const nlohmann::json parts = export_safetensors(checkpoint, dir / "parts", {.max_shard_bytes = 1'000'000});
  EXPECT_GT(parts["files"].size(), 3u);
  EXPECT_EQ(parts["files"][0], fmt::format("model-00001-of-{:05d}.safetensors", parts["files"].size()));
  CheckpointReader reader(checkpoint);
  for (const char* name : {"one", "parts"}) {
    const auto entries = read_model_headers(dir / name);
    ASSERT_EQ(entries.size(), kTensors.size()) << name;
    std::uint64_t bytes = 0;
    for (const auto& [tensor_name, entry] : entries) {
      const ManifestTensor& tensor = reader.tensor(tensor_name, "value");
      ASSERT_EQ(entry.shape, tensor.shape);
      const at::Tensor seen = at::empty({entry.numel()}, at::kFloat), wanted = at::empty({entry.numel()}, at::kFloat);
      read_safetensors_slice(entry, 0, seen);
      reader.read({{&tensor, 0, wanted}});
      EXPECT_EQ(std::memcmp(seen.data_ptr(), wanted.data_ptr(), wanted.nbytes()), 0) << tensor_name;
      bytes += wanted.nbytes();
    }
    EXPECT_EQ(parts["bytes"], bytes);
    EXPECT_EQ(nlohmann::json::parse(read_file(dir / name / "config.json")),
              nlohmann::json::parse(R"({"model_type":"bert","dtype":"float32"})"));
    EXPECT_TRUE(fs::exists(dir / name / "tokenizer.json"));
    EXPECT_FALSE(fs::exists(dir / name / "empty.txt"));
  }
  EXPECT_NE(error_of(ErrorKind::config, [&] { export_safetensors(checkpoint, dir / "one", {}); }).find("already"),
            std::string::npos);
  EXPECT_NE(
      error_of(ErrorKind::config, [&] { export_safetensors(checkpoint, dir / "x", {.dtype = "fp8"}); }).find("fp8"),
      std::string::npos);
}

TEST(Export, Bfloat16IsRoundedToNearestEven) {
  TempDir dir;
  const auto comm = make_self_communicator();
  const at::Tensor values = at::tensor({1.0F, 1.00390625F, 1.01171875F, -3.14159F, 1e-39F, 3.39e38F});
  StateView view;
  view.slices.push_back({"w", "value", {6}, 0, values});
  view.run = nlohmann::json::object();
  CheckpointStore(dir / "a", *comm).save(1, view);
  export_safetensors(dir / "a/checkpoint-1", dir / "m", {.dtype = "bf16"});
  const auto entry = read_model_headers(dir / "m").at("w");
  EXPECT_EQ(entry.dtype, "BF16");
  const at::Tensor seen = at::empty({6}, at::kFloat);
  read_safetensors_slice(entry, 0, seen);
  EXPECT_TRUE(at::equal(seen, values.to(at::kBFloat16).to(at::kFloat)));
}

TEST(Import, AModelDirectoryBecomesStepZeroAndComesOutAgain) {
  TempDir dir;
  const fs::path checkpoint = save_at(dir / "a", 5, 2);
  export_safetensors(checkpoint, dir / "model", {.max_shard_bytes = 500'000});
  std::ofstream(dir / "model/optimizer.pt") << "a pickle, not to be touched";
  const nlohmann::json report = import_model(dir / "model", dir / "out");
  EXPECT_EQ(report["tensors"], kTensors.size());
  EXPECT_EQ(report["refused_pickles"], nlohmann::json({"optimizer.pt"}));
  EXPECT_NE(report["hint"].get<std::string>().find("--model_name_or_path"), std::string::npos);
  const fs::path imported = dir / "out/checkpoint-0";
  EXPECT_TRUE(verify_checkpoint(imported).empty());
  EXPECT_FALSE(fs::exists(imported / "optimizer.pt"));
  EXPECT_EQ(read_file(imported / "tokenizer.json"), read_file(checkpoint / "tokenizer.json"));
  const nlohmann::json different = diff_checkpoints(imported, checkpoint);
  EXPECT_TRUE(different["tensors"].empty() && different["only_in_a"].empty()) << different;
  EXPECT_EQ(different["only_in_b"].size(), 2 * (kTensors.size() - 1));  // the moments
}

TEST(Import, APickleIsRefusedWithAdvice) {
  TempDir dir;
  fs::create_directories(dir / "model");
  std::ofstream(dir / "model/pytorch_model.bin") << "PK";
  EXPECT_NE(error_of(ErrorKind::data, [&] { import_model(dir / "model", dir / "out"); }).find("save_pretrained"),
            std::string::npos);
  EXPECT_FALSE(fs::exists(dir / "out"));
}

// A published checkpoint of the HF Trainer: weights, tokenizer and the pickles of optimizer, schedule and generators.
TEST(Import, ATrainerCheckpointGivesItsWeightsAndItsPicklesAreRefusedByName) {
  const char* root = std::getenv("SHARDTUNE_TEST_DATA");
  if (root == nullptr) GTEST_SKIP() << "SHARDTUNE_TEST_DATA is not set";
  const fs::path model = fs::path(root) / "models/bert-micro-nli-checkpoint-79";
  TempDir dir;
  const nlohmann::json report = import_model(model, dir / "out");
  EXPECT_EQ(report["refused_pickles"],
            nlohmann::json({"optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"}));
  EXPECT_NE(report["hint"].get<std::string>().find("optimizer and schedule begin anew"), std::string::npos);
  const fs::path imported = dir / "out/checkpoint-0";
  EXPECT_TRUE(verify_checkpoint(imported).empty());
  for (const char* pickle : {"optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin"})
    EXPECT_FALSE(fs::exists(imported / pickle)) << pickle;
  const auto entries = read_model_headers(model);
  ASSERT_GE(entries.size(), 35u);
  CheckpointReader reader(imported);
  for (const auto& [name, entry] : entries) {
    const ManifestTensor& tensor = reader.tensor(name, "value");
    ASSERT_EQ(tensor.shape, entry.shape) << name;
    const at::Tensor seen = at::empty({entry.numel()}, at::kFloat), wanted = at::empty({entry.numel()}, at::kFloat);
    reader.read({{&tensor, 0, seen}});
    read_safetensors_slice(entry, 0, wanted);
    EXPECT_EQ(std::memcmp(seen.data_ptr(), wanted.data_ptr(), wanted.nbytes()), 0) << name;
  }
  EXPECT_EQ(read_file(imported / "tokenizer.json"), read_file(model / "tokenizer.json"));
}

TEST(Sizes, AreReadAsHuggingFaceDoes) {
  EXPECT_EQ(parse_byte_size("5GB", "o"), 5'000'000'000U);
  EXPECT_EQ(parse_byte_size("200MiB", "o"), 200U << 20);
  EXPECT_EQ(parse_byte_size("4096", "o"), 4096U);
  for (const char* wrong : {"", "GB", "-1", "0", "5XB", "1.5GB", "99999999999999999999", "99999999999TB"})
    EXPECT_NE(error_of(ErrorKind::config, [&] { parse_byte_size(wrong, "max_shard_size"); }).find("max_shard_size"),
              std::string::npos);
}

TEST(Prune, KeepsTheNewestGoodAndTheBest) {
  TempDir dir;
  for (const std::int64_t step : {1, 2, 3, 4, 5}) save_at(dir.path(), step, 1);
  std::fstream(dir / "checkpoint-5/shard-00000-of-00001.h5", std::ios::in | std::ios::out).seekp(9000) << "x";
  EXPECT_EQ(prune_output_dir(dir.path(), 2),
            (std::vector<std::string>{"checkpoint-3", "checkpoint-2", "checkpoint-1"}));
  EXPECT_TRUE(verify_checkpoint(dir / "checkpoint-4").empty());
  EXPECT_EQ(prune_output_dir(dir.path(), 1),
            (std::vector<std::string>{"checkpoint-5"}));  // the damaged one, not the last good one
  fs::remove(dir / "checkpoint-4/manifest.json");
  error_of(ErrorKind::data, [&] { prune_output_dir(dir.path(), 1); });
  error_of(ErrorKind::config, [&] { prune_output_dir(dir.path(), 0); });
}

TEST(Prune, WhatIsBeingReadStays) {
  TempDir dir;
  for (const std::int64_t step : {1, 2, 3}) save_at(dir.path(), step, 1);
  {
    const CheckpointReader reader(dir / "checkpoint-1");
    EXPECT_EQ(prune_output_dir(dir.path(), 1), std::vector<std::string>{"checkpoint-2"});
  }
  EXPECT_EQ(prune_output_dir(dir.path(), 1), std::vector<std::string>{"checkpoint-1"});
}

TEST(Repair, RebuildsLatestRemovesRemainsAndTouchesNoCheckpoint) {
  TempDir dir;
  for (const std::int64_t step : {1, 2, 3}) save_at(dir.path(), step, 2);
  fs::create_directories(dir / "checkpoint-9.partial");
  std::ofstream(dir / "checkpoint-9.partial/shard-00000-of-00001.h5.tmp") << "half";
  fs::create_directories(dir / "checkpoint-0.deleting");
  std::ofstream(dir / "latest") << "checkpoint-77\n";
  std::ofstream(dir / "checkpoint-3/tokenizer.json") << "other";
  const nlohmann::json report = repair_output_dir(dir.path());
  EXPECT_EQ(report["removed"], nlohmann::json({"checkpoint-0.deleting", "checkpoint-9.partial"}));
  EXPECT_EQ(report["latest"], "checkpoint-2");
  ASSERT_EQ(report["damaged"].size(), 1u);
  EXPECT_EQ(report["damaged"][0]["checkpoint"], "checkpoint-3");
  EXPECT_EQ(read_file(dir / "latest"), "checkpoint-2\n");
  EXPECT_TRUE(fs::exists(dir / "checkpoint-3/manifest.json"));
  EXPECT_TRUE(verify_checkpoint(dir / "checkpoint-1").empty());
}

TEST(OutputLock, ASecondJobIsRefusedByNameAndACrashLeavesNoLock) {
  TempDir dir;
  {
    const OutputLock first(dir.path(), "train");
    const std::string said = error_of(ErrorKind::config, [&] { const OutputLock second(dir.path(), "train", 0.2); });
    EXPECT_NE(said.find(fmt::format("train, process {}", ::getpid())), std::string::npos) << said;
    error_of(ErrorKind::config, [&] { repair_output_dir(dir.path()); });
    error_of(ErrorKind::config, [&] { prune_output_dir(dir.path(), 1); });
  }
  const OutputLock again(dir.path(), "train", 0);
}

TEST(OutputLock, IsReleasedWhenItsHolderIsKilled) {
  TempDir dir;
  int ready[2];
  ASSERT_EQ(::pipe(ready), 0);
  const pid_t child = ::fork();
  if (child == 0) {
    const OutputLock lock(dir.path(), "train", 0);
    [[maybe_unused]] const auto put = ::write(ready[1], "x", 1);
    ::pause();
    ::_exit(0);
  }
  char byte = 0;
  ASSERT_EQ(::read(ready[0], &byte, 1), 1);
  error_of(ErrorKind::config, [&] { const OutputLock second(dir.path(), "train", 0); });
  ::kill(child, SIGKILL);
  const OutputLock next(dir.path(), "train", 10);  // without waiting for the child: patience must suffice
  ::waitpid(child, nullptr, 0);
}

TEST(ReaderLock, KeepsDeletersOutAndTheyKeepReadersOut) {
  TempDir dir;
  const fs::path checkpoint = save_at(dir.path(), 5, 1);
  {
    const UniqueFd reader = lock_for_reading(checkpoint), another = lock_for_reading(checkpoint);
    EXPECT_TRUE(reader && another);
    EXPECT_FALSE(lock_for_deleting(checkpoint).has_value());
  }
  const std::optional<UniqueFd> deleter = lock_for_deleting(checkpoint);
  ASSERT_TRUE(deleter.has_value());
  fs::rename(checkpoint, dir / "checkpoint-5.deleting");  // under its new name as well
  EXPECT_FALSE(lock_for_reading(dir / "checkpoint-5.deleting"));
}

// The verification stands still where it opens the second named pipe; nobody may delete what it reads meanwhile.
TEST(ReaderLock, VerificationHoldsIt) {
  TempDir dir;
  const fs::path checkpoint = save_at(dir.path(), 5, 1);
  for (const char* pipe : {"config.json", "tokenizer.json"}) {
    fs::remove(checkpoint / pipe);
    ASSERT_EQ(::mkfifo((checkpoint / pipe).c_str(), 0600), 0);
  }
  std::vector<std::string> problems;
  std::thread verification([&] { problems = verify_checkpoint(checkpoint); });
  // Each returns when the other end is opened.
  const UniqueFd first(::open((checkpoint / "config.json").c_str(), O_WRONLY));
  EXPECT_FALSE(lock_for_deleting(checkpoint).has_value());
  const UniqueFd second(::open((checkpoint / "tokenizer.json").c_str(), O_WRONLY));
  verification.join();
  EXPECT_EQ(problems.size(), 2u);
  EXPECT_TRUE(lock_for_deleting(checkpoint).has_value());
}

}  // namespace
}  // namespace shardtune
