#include <algorithm>
#include <atomic>
#include <chrono>
#include <ctime>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <mutex>
#include <set>
#include <thread>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_reader.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"

namespace shardtune {
namespace {

const std::vector<TestTensor> kTensors = test_tensors();

void save_at(const std::filesystem::path& dir, std::int64_t step, int num_ranks, int keep = 0,
             const std::vector<std::int64_t>& protected_steps = {}) {
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    CheckpointStore(dir, comm).save(step, expected_state(kTensors, step, comm.rank(), comm.size()),
                                    {keep, protected_steps});
  });
}

// What every rank of a load says: empty = loaded with the right bits and run state.
std::string load_at(const std::filesystem::path& checkpoint, std::int64_t step, int num_ranks,
                    const std::vector<TestTensor>& tensors = kTensors) {
  std::mutex mutex;
  std::multiset<std::string> said;
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    std::string mine;
    try {
      StateView view = blank_state(tensors, comm.rank(), comm.size());
      const auto run = CheckpointStore(checkpoint.parent_path(), comm).load(checkpoint, view);
      mine = difference(view, tensors, step, comm.rank(), comm.size());
      if (run != expected_state(tensors, step, 0, 1).run) mine += " run state";
    } catch (const Error& e) {
      if (e.kind() == ErrorKind::comm) throw;
      EXPECT_EQ(e.kind(), ErrorKind::data) << e.what();
      mine = e.what();
    }
    const std::lock_guard lock(mutex);
    said.insert(mine);
  });
  EXPECT_EQ(said.count(*said.begin()), static_cast<std::size_t>(num_ranks)) << "ranks disagree: " << *said.begin();
  return *said.begin();
}

TEST(CheckpointStore, SavedAtAnyNumberOfRanksLoadsAtAnyOtherBitForBit) {
  TempDir dir;
  for (int saved = 1; saved <= 8; ++saved) {
    save_at(dir.path(), saved, saved);
    for (int loaded = 1; loaded <= 8; ++loaded)
      EXPECT_EQ(load_at(dir / fmt::format("checkpoint-{}", saved), saved, loaded), "") << saved << " -> " << loaded;
    EXPECT_TRUE(verify_checkpoint(dir / fmt::format("checkpoint-{}", saved)).empty());
  }
  EXPECT_EQ(read_checkpoint_run_state(dir / "checkpoint-3")["step"], 3);
  EXPECT_EQ(read_file(dir / "latest"), "checkpoint-8\n");
  EXPECT_EQ(read_file(dir / "checkpoint-2/config.json"), "{\"model_type\": \"bert\"}\n");
}

// Several ranks write one file together; a reader sees no difference.
TEST(CheckpointStore, RanksThatShareFilesSaveTheSameState) {
  TempDir dir;
  for (const auto& [num_ranks, per_file] : std::vector<std::pair<int, int>>{{2, 2}, {5, 2}, {4, 3}, {3, 8}}) {
    const std::filesystem::path out = dir / fmt::format("{}_{}", num_ranks, per_file);
    run_thread_ranks(num_ranks, [&](Communicator& comm) {
      CheckpointStore store(out, comm, std::size_t{1} << 20, per_file);
      for (const std::int64_t step : {1, 2}) {
        const SaveReport report = store.save(step, expected_state(kTensors, step, comm.rank(), comm.size()));
        EXPECT_EQ(report.step, step);
      }
    });
    const auto checkpoint = out / "checkpoint-2";
    EXPECT_TRUE(verify_checkpoint(checkpoint).empty());
    const Manifest manifest = read_manifest(checkpoint);
    EXPECT_EQ(manifest.num_ranks, num_ranks);
    EXPECT_EQ(std::count_if(manifest.files.begin(), manifest.files.end(),
                            [](const auto& file) { return file.has_block_table; }),
              (num_ranks + per_file - 1) / per_file);
    for (const int loaded : {1, 2, 5}) EXPECT_EQ(load_at(checkpoint, 2, loaded), "") << num_ranks << " by " << per_file;
    EXPECT_EQ(load_at(out / "checkpoint-1", 1, 3), "");
  }
}

// A checkpoint of format version 1, made by this program's first writers of it (save_loop DIR 2 7 7 1), loads for ever.
TEST(CheckpointStore, TheGoldenCheckpointOfVersion1Loads) {
  const std::filesystem::path golden =
      std::filesystem::path(std::getenv("SHARDTUNE_SOURCE_DIR")) / "tests/golden/checkpoint_v1";
  EXPECT_TRUE(verify_checkpoint(golden).empty());
  EXPECT_EQ(read_manifest(golden).version, 1);
  for (const int num_ranks : {1, 3}) EXPECT_EQ(load_at(golden, 7, num_ranks), "");
}

// N to M to K: what is loaded at one number of ranks and saved again is the same state.
TEST(CheckpointStore, ChainsOfRankCountsChangeNoBit) {
  TempDir dir;
  for (const std::vector<int>& chain : {std::vector<int>{1, 8, 3}, {7, 2, 5}, {4, 6, 1}}) {
    std::filesystem::path last = dir / fmt::format("{}/0/checkpoint-9", chain[0]);
    save_at(last.parent_path(), 9, chain[0]);
    for (std::size_t i = 1; i < chain.size(); ++i) {
      const auto next = dir / fmt::format("{}/{}/checkpoint-9", chain[0], i);
      run_thread_ranks(chain[i], [&](Communicator& comm) {
        StateView view = blank_state(kTensors, comm.rank(), comm.size());
        CheckpointStore(last.parent_path(), comm).load(last, view);
        CheckpointStore(next.parent_path(), comm).save(9, view);
      });
      last = next;
    }
    for (const int loaded : {1, 2, 8}) EXPECT_EQ(load_at(last, 9, loaded), "");
  }
}

TEST(CheckpointStore, EqualStatesGiveEqualFiles) {
  TempDir dir;
  save_at(dir / "a", 7, 3);
  // Time stamps count seconds: the second save falls into another one.
  const std::time_t before = std::time(nullptr);
  while (std::time(nullptr) == before) std::this_thread::sleep_for(std::chrono::milliseconds(10));
  save_at(dir / "b", 7, 3);
  int compared = 0;
  for (const auto& entry : std::filesystem::directory_iterator(dir / "a/checkpoint-7")) {
    EXPECT_EQ(read_file(entry.path()), read_file(dir / "b/checkpoint-7" / entry.path().filename())) << entry.path();
    ++compared;
  }
  EXPECT_EQ(compared, 3 + 3 + 3 + 1);
}

TEST(CheckpointStore, ALoadReadsLittleMoreThanItsSlices) {
  TempDir dir;
  const std::vector<TestTensor> tensors = {
      {"a.frozen", {1}}, {"b.large", {3'000'001}}, {"c.small", {10}}, {"d.large", {7'000'003}}};
  run_thread_ranks(2, [&](Communicator& comm) {
    CheckpointStore(dir.path(), comm).save(1, expected_state(tensors, 1, comm.rank(), comm.size()));
  });
  std::uint64_t total = 0, needed = 0;
  for (int rank = 0; rank < 3; ++rank) {
    CheckpointReader reader(dir / "checkpoint-1");
    StateView view = blank_state(tensors, rank, 3);
    std::vector<CheckpointReader::Request> requests;
    for (StateSlice& slice : view.slices) {
      requests.push_back({&reader.tensor(slice.name, slice.field), slice.offset, slice.data});
      needed += slice.data.nbytes();
    }
    reader.read(requests);
    EXPECT_EQ(difference(view, tensors, 1, rank, 3), "");
    total += reader.bytes_read();
  }
  // Two large tensors with three fields, each in 4 overlaps of the ranks' pieces: a range may touch a part of a block
  // at either end, and neighbouring ranges share it.
  EXPECT_EQ(needed, (3'000'001U + 10 + 7'000'003) * 12 + 4);
  EXPECT_LE(total, needed + 2 * 3 * 4 * kBlockBytes);
}

TEST(CheckpointStore, AnotherModelIsRefusedOnEveryRank) {
  TempDir dir;
  save_at(dir.path(), 1, 2);
  auto more = kTensors;
  more.push_back({"extra", {3}});
  EXPECT_NE(load_at(dir / "checkpoint-1", 1, 3, more).find("'extra'"), std::string::npos);
  auto fewer = kTensors;
  fewer.erase(fewer.begin() + 2);
  EXPECT_NE(load_at(dir / "checkpoint-1", 1, 3, fewer).find("'layer.0.bias', which this model does not have"),
            std::string::npos);
  auto other = kTensors;
  other[1].shape = {11, 13};
  const std::string said = load_at(dir / "checkpoint-1", 1, 3, other);
  EXPECT_NE(said.find("[13,11]"), std::string::npos) << said;
  EXPECT_NE(said.find("[11,13]"), std::string::npos) << said;
  EXPECT_NE(load_at(dir / "checkpoint-9", 1, 2).find("checkpoint-9"), std::string::npos);
}

TEST(CheckpointStore, WeightsLoadWithoutOptimizerState) {
  TempDir dir;
  save_at(dir.path(), 1, 2);
  run_thread_ranks(3, [&](Communicator& comm) {
    StateView view = blank_state(kTensors, comm.rank(), comm.size());
    std::erase_if(view.slices, [](const StateSlice& slice) { return slice.field != "value"; });
    CheckpointStore(dir.path(), comm).load(dir / "checkpoint-1", view);
  });
}

TEST(CheckpointStore, RetentionKeepsTheNewestTheProtectedAndTheLast) {
  TempDir dir;
  for (std::int64_t step : {1, 2, 3, 4}) save_at(dir.path(), step, 1, 2);
  EXPECT_EQ(committed_steps(dir.path()), (std::vector<std::int64_t>{4, 3}));
  save_at(dir.path(), 5, 1, 2, {3});
  EXPECT_EQ(committed_steps(dir.path()), (std::vector<std::int64_t>{5, 3}));
  save_at(dir.path(), 6, 1, 1, {3});
  EXPECT_EQ(committed_steps(dir.path()), (std::vector<std::int64_t>{6, 3}));
  save_at(dir.path(), 7, 1, 1);
  EXPECT_EQ(committed_steps(dir.path()), (std::vector<std::int64_t>{7}));
  for (const auto& entry : std::filesystem::directory_iterator(dir.path()))
    EXPECT_TRUE(entry.path().filename() == "latest" || entry.path().filename() == "checkpoint-7") << entry.path();
}

TEST(CheckpointStore, AnAbandonedCheckpointOfTheSameStepIsMovedAside) {
  TempDir dir;
  save_at(dir.path(), 1, 3);
  save_at(dir.path(), 1, 2);
  save_at(dir.path(), 1, 1);
  EXPECT_EQ(load_at(dir / "checkpoint-1", 1, 2), "");
  EXPECT_EQ(read_manifest(dir / "checkpoint-1").num_ranks, 1);
  EXPECT_TRUE(verify_checkpoint(dir / "checkpoint-1.rejected-test-run").empty());
  EXPECT_EQ(read_manifest(dir / "checkpoint-1.rejected-test-run.2").num_ranks, 2);
  EXPECT_EQ(committed_steps(dir.path()), (std::vector<std::int64_t>{1}));
}

TEST(CheckpointStore, ANewerFormatIsRefusedClearly) {
  TempDir dir;
  save_at(dir.path(), 1, 1);
  const auto file = dir / "checkpoint-1/manifest.json";
  std::string text = read_file(file);
  text.resize(text.rfind(",\"checksum\""));
  text.replace(text.find("\"version\":1"), 11, "\"version\":3");
  write_file_durably(file, text + ",\"checksum\":\"" + to_hex(hash_bytes(text)) + "\"}\n");
  const std::string said = load_at(dir / "checkpoint-1", 1, 2);
  EXPECT_NE(said.find("format version 3"), std::string::npos) << said;
  EXPECT_NE(said.find("update shardtune"), std::string::npos) << said;
}

// One rank fails at a phase of the save: every rank must say the same, nothing may be committed, all must go on.
// Returns the number of failures that were injected.
int fail_at_every_phase(int ranks_per_file) {
  TempDir dir;
  save_at(dir.path(), 1, 3);
  const std::vector<std::string> phases = {"begin",         "shard_created",       "dataset_written", "shard_closed",
                                           "part_read_back", "shard_synced",       "shard_renamed",   "block_table_written",
                                           "agreed",        "manifest_written"};
  // Once on rank 0, once per file, or once per rank.
  const auto num_chances = [&](const std::string& phase) {
    if (phase == "agreed" || phase == "manifest_written") return 1;
    return phase == "begin" || phase == "dataset_written" || phase == "shard_closed"
               ? 3
               : (2 + ranks_per_file) / ranks_per_file;
  };
  int injected = 0;
  for (const std::string& phase : phases)
    for (int nth = 0; nth < num_chances(phase); ++nth) {
      std::atomic<int> countdown = nth;
      set_save_phase_hook([&](const char* now, std::int64_t) {
        if (now == phase && countdown-- == 0) fail(ErrorKind::io, "injected at " + phase);
      });
      std::mutex mutex;
      std::multiset<std::string> said;
      run_thread_ranks(3, [&](Communicator& comm) {
        try {
          CheckpointStore store(dir.path(), comm, std::size_t{1} << 20, ranks_per_file);
          store.save(2, expected_state(kTensors, 2, comm.rank(), comm.size()), {.keep = 1});
          ADD_FAILURE() << "saved in spite of a failure at " << phase;
        } catch (const Error& e) {
          if (e.kind() == ErrorKind::comm) throw;
          EXPECT_EQ(e.kind(), ErrorKind::io);
          const std::lock_guard lock(mutex);
          said.insert(e.what());
        }
      });
      set_save_phase_hook(nullptr);
      EXPECT_EQ(said.size(), 3u);
      if (said.empty()) continue;
      EXPECT_EQ(said.count(*said.begin()), 3u);
      EXPECT_NE(said.begin()->find("injected at " + phase), std::string::npos) << *said.begin();
      EXPECT_NE(said.begin()->find("on rank "), std::string::npos) << *said.begin();
      EXPECT_FALSE(std::filesystem::exists(dir / "checkpoint-2.partial")) << phase;
      EXPECT_EQ(committed_steps(dir.path()), (std::vector<std::int64_t>{1})) << phase;
      ++injected;
    }
  EXPECT_TRUE(verify_checkpoint(dir / "checkpoint-1").empty());
  save_at(dir.path(), 2, 3, 1);
  EXPECT_EQ(load_at(dir / "checkpoint-2", 2, 2), "");
  return injected;
}

TEST(CheckpointStore, AFailureAtAnyPhaseOnAnyRankIsTheSameErrorEverywhere) {
  EXPECT_EQ(fail_at_every_phase(1), 3 * 8 + 2);
  EXPECT_EQ(fail_at_every_phase(2), 3 * 3 + 2 * 5 + 2);
}

TEST(CheckpointStore, SlicesThatDoNotCoverATensorAreNotCommitted) {
  TempDir dir;
  run_thread_ranks(2, [&](Communicator& comm) {
    StateView view = expected_state(kTensors, 1, comm.rank(), comm.size());
    if (comm.rank() == 1) view.slices.erase(view.slices.begin());
    try {
      CheckpointStore(dir.path(), comm).save(1, view);
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::internal);
      EXPECT_NE(std::string(e.what()).find("embeddings.word.weight"), std::string::npos) << e.what();
    }
  });
  EXPECT_TRUE(std::filesystem::is_empty(dir.path()));
}

TEST(CheckpointStore, AnOutputDirectoryThatCannotBeMadeIsNamed) {
  TempDir dir;
  std::ofstream(dir / "file") << "x";
  try {
    save_at(dir / "file/out", 1, 2);
    FAIL();
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::io);
    EXPECT_NE(std::string(e.what()).find("file/out"), std::string::npos) << e.what();
  }
}

TEST(CheckpointStore, PhasesComeInOrder) {
  TempDir dir;
  std::vector<std::string> seen;
  save_at(dir.path(), 1, 1);
  set_save_phase_hook([&](const char* phase, std::int64_t step) {
    EXPECT_EQ(step, 2);
    if (seen.empty() || seen.back() != phase) seen.emplace_back(phase);
  });
  save_at(dir.path(), 2, 1, 1);
  set_save_phase_hook(nullptr);
  EXPECT_EQ(seen, (std::vector<std::string>{"begin", "shard_created", "dataset_written", "shard_closed",
                                            "part_read_back", "shard_synced", "shard_renamed", "block_table_written", "agreed", "manifest_written",
                                            "directory_renamed", "latest_written", "pruned"}));
}

}  // namespace
}  // namespace shardtune
