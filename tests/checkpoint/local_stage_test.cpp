// Node-local staging: what is on the local disk is no checkpoint until it was drained, and is not lost when the job
// dies before that.
#include "checkpoint/local_stage.hpp"

#include <sys/resource.h>

#include <csignal>
#include <fstream>
#include <mutex>
#include <set>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"
#include "tests/support/error_of.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;

const std::vector<TestTensor> kTensors = test_tensors(3000);

struct Place {
  fs::path out, local;
  int ranks_per_file = 1;
  std::vector<int> nodes = {};  // of each rank; no node sees the disk of another. Empty: all on one

  fs::path local_of(int rank) const {
    return nodes.empty() ? local : local / fmt::format("node-{}", nodes.at(static_cast<std::size_t>(rank)));
  }
};

// Saves `step`; a failure is expected where `fails` says so and must be the same Error on all ranks.
void save_at(const Place& place, std::int64_t step, int num_ranks, bool fails = false) {
  std::mutex mutex;
  std::multiset<std::string> said;
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    CheckpointStore store(place.out, comm, std::size_t{1} << 20, place.ranks_per_file, place.local_of(comm.rank()));
    try {
      const SaveReport report = store.save(step, expected_state(kTensors, step, comm.rank(), comm.size()));
      EXPECT_FALSE(fails);
      EXPECT_TRUE(comm.rank() != 0 || report.drain_seconds > 0);
    } catch (const Error& e) {
      EXPECT_TRUE(fails) << e.what();
      EXPECT_EQ(e.kind(), ErrorKind::io);
      const std::lock_guard lock(mutex);
      said.insert(e.what());
    }
  });
  if (fails) {
    EXPECT_EQ(said.count(*said.begin()), static_cast<std::size_t>(num_ranks));
  }
}

// A job that dies when its part is whole on the local disks and not yet drained.
void die_before_drain(const Place& place, std::int64_t step, int num_ranks) {
  set_save_phase_hook([](const char* phase, std::int64_t) {
    if (std::string_view(phase) == "local_complete") fail(ErrorKind::io, "killed");
  });
  save_at(place, step, num_ranks, true);
  set_save_phase_hook(nullptr);
}

// What a job of `num_ranks` resumes from, with its bits checked; -1 = nothing.
std::int64_t resume_at(const Place& place, int num_ranks) {
  std::int64_t step = -1;
  run_thread_ranks(num_ranks, [&](Communicator& comm) {
    CheckpointStore store(place.out, comm, std::size_t{1} << 20, place.ranks_per_file, place.local_of(comm.rank()));
    const fs::path newest = store.newest_usable();
    if (newest.empty()) return;
    StateView view = blank_state(kTensors, comm.rank(), comm.size());
    const auto found = store.load(newest, view).at("step").get<std::int64_t>();
    EXPECT_EQ(difference(view, kTensors, found, comm.rank(), comm.size()), "");
    store.prepare_resume(found, "next");
    if (comm.rank() == 0) step = found;
  });
  return step;
}

std::vector<fs::path> files_below(const fs::path& directory) {
  std::vector<fs::path> files;
  for (const auto& entry : fs::recursive_directory_iterator(directory))
    if (entry.is_regular_file()) files.push_back(entry.path());
  return files;
}

TEST(LocalStage, ADrainedCheckpointIsTheSameAsOneWithoutLocalDisk) {
  for (const int ranks_per_file : {1, 2}) {
    TempDir dir;
    const Place place{dir / "out", dir / "local", ranks_per_file};
    save_at(place, 5, 3);
    run_thread_ranks(3, [&](Communicator& comm) {
      CheckpointStore(dir / "plain", comm, std::size_t{1} << 20, ranks_per_file)
          .save(5, expected_state(kTensors, 5, comm.rank(), comm.size()));
    });
    EXPECT_TRUE(verify_checkpoint(dir / "out/checkpoint-5").empty());
    std::size_t compared = 0;
    for (const fs::path& file : files_below(dir / "plain/checkpoint-5")) {
      EXPECT_TRUE(read_file(file) == read_file(dir / "out/checkpoint-5" / file.filename())) << file;
      ++compared;
    }
    EXPECT_EQ(files_below(dir / "out/checkpoint-5").size(), compared);
    EXPECT_TRUE(files_below(dir / "local").empty()) << "a drained checkpoint stays on the local disk";
  }
}

TEST(LocalStage, ItIsCommittedOnlyWhenItWasDrained) {
  TempDir dir;
  const Place place{dir / "out", dir / "local"};
  save_at(place, 1, 2);
  int seen = 0;
  set_save_phase_hook([&](const char* phase, std::int64_t) {
    if (std::string_view(phase) != "agreed") {
      EXPECT_EQ(committed_steps(place.out).front(), std::string_view(phase) == "directory_renamed" || seen > 0 ? 2 : 1)
          << phase;
      seen += std::string_view(phase) == "directory_renamed";
    }
  });
  save_at(place, 2, 1);
  set_save_phase_hook(nullptr);
  EXPECT_EQ(seen, 1);
}

TEST(LocalStage, AJobThatDiedBeforeTheDrainGoesOnFromTheLocalDisks) {
  for (const int ranks_per_file : {1, 2})
    for (const int resumed : {1, 3, 5}) {
      TempDir dir;
      const Place place{dir / "out", dir / "local", ranks_per_file};
      save_at(place, 1, 3);
      die_before_drain(place, 2, 3);
      EXPECT_EQ(committed_steps(place.out), std::vector<std::int64_t>{1});
      EXPECT_EQ(resume_at(place, resumed), 2) << resumed;
      EXPECT_TRUE(verify_checkpoint(place.out / "checkpoint-2").empty());
      EXPECT_TRUE(files_below(place.local).empty());
      EXPECT_EQ(resume_at(place, 2), 2);
    }
}

TEST(LocalStage, AnIncompleteOrDamagedLocalCopyIsLeftOut) {
  for (const bool is_damaged : {false, true}) {
    TempDir dir;
    const Place place{dir / "out", dir / "local"};
    save_at(place, 1, 2);
    die_before_drain(place, 2, 2);
    int spoiled = 0;
    for (const fs::path& file : files_below(place.local)) {
      if (file.filename() != "shard-00001-of-00002.h5") continue;
      if (is_damaged)
        std::fstream(file, std::ios::in | std::ios::out).seekp(50'000) << "x";
      else
        fs::remove(file);
      ++spoiled;
    }
    EXPECT_EQ(spoiled, 1);
    EXPECT_EQ(resume_at(place, 3), 1) << is_damaged;
    EXPECT_EQ(committed_steps(place.out), std::vector<std::int64_t>{1});
    EXPECT_FALSE(fs::exists(place.out / "checkpoint-2.partial"));
  }
}

// A shared disk that is full for a minute must not cost the newest whole copy there is.
TEST(LocalStage, AWholeCopyThatCannotBeDrainedNowStaysForTheNextStart) {
  TempDir dir;
  const Place place{dir / "out", dir / "local"};
  save_at(place, 1, 2);
  die_before_drain(place, 2, 2);
  const std::size_t num_local = files_below(place.local).size();
  std::signal(SIGXFSZ, SIG_IGN);
  rlimit before{};
  ASSERT_EQ(::getrlimit(RLIMIT_FSIZE, &before), 0);
  const rlimit low{50'000, before.rlim_max};
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &low), 0);
  const std::string said = testing_support::error_of(ErrorKind::io, [&] { resume_at(place, 3); });
  ASSERT_EQ(::setrlimit(RLIMIT_FSIZE, &before), 0);
  EXPECT_NE(said.find("File too large"), std::string::npos) << said;
  EXPECT_NE(said.find("the copy on the local disks is whole and stays"), std::string::npos) << said;
  EXPECT_EQ(files_below(place.local).size(), num_local);
  EXPECT_EQ(committed_steps(place.out), std::vector<std::int64_t>{1});
  EXPECT_EQ(resume_at(place, 3), 2);
}

TEST(LocalStage, AnotherRunsLocalCopyIsLeftOut) {
  TempDir dir;
  const Place place{dir / "out", dir / "local"};
  die_before_drain(place, 2, 2);
  run_thread_ranks(2, [&](Communicator& comm) {
    StateView view = expected_state(kTensors, 1, comm.rank(), comm.size());
    view.run["run_id"] = "another";
    CheckpointStore(place.out, comm).save(1, view);
  });
  EXPECT_EQ(resume_at(place, 2), 1);
}

// The newest whole one is enough: the local disk need not hold more than it and the one being written.
TEST(LocalStage, FailingDrainsDoNotFillTheLocalDisk) {
  TempDir dir;
  const Place place{dir / "out", dir / "local"};
  for (const std::int64_t step : {1, 2, 3}) die_before_drain(place, step, 2);
  std::set<std::string> steps;
  for (const fs::path& file : files_below(place.local)) steps.insert(file.parent_path().filename());
  EXPECT_EQ(steps, std::set<std::string>{"checkpoint-3"});
  EXPECT_EQ(resume_at(place, 1), 3);
}

TEST(LocalStage, NodesThatSeeOnlyTheirOwnDisksGoOnTogether) {
  for (const int ranks_per_file : {1, 2})
    for (const std::vector<int>& nodes :
         std::vector<std::vector<int>>{{0, 1}, {1, 0}, {0, 0, 1, 1}, {1, 1, 0}, {0, 1, 2}}) {
      TempDir dir;
      Place place{dir / "out", dir / "local", ranks_per_file, {0, 0, 1, 1}};
      save_at(place, 1, 4);
      die_before_drain(place, 2, 4);
      for (const int node : {0, 1}) EXPECT_FALSE(files_below(dir / fmt::format("local/node-{}", node)).empty());
      place.nodes = nodes;
      place.ranks_per_file = 1;
      EXPECT_EQ(resume_at(place, static_cast<int>(nodes.size())), 2);
      EXPECT_TRUE(verify_checkpoint(place.out / "checkpoint-2").empty());
      EXPECT_TRUE(files_below(place.local).empty());
    }
}

TEST(LocalStage, ANodeThatDoesNotComeBackMeansTheCommittedCheckpoint) {
  struct Case {
    std::vector<int> nodes;
    std::int64_t taken_later;
  };
  // Later, when nodes 0 and 1 are there: step 3 where one of them holds all of it; nothing of it where a part lies on
  // node 2; step 2 where neither has been used since.
  const std::vector<Case> cases = {{{0}, 3}, {{1, 1}, 3}, {{0, 2}, 1}, {{2, 3, 4}, 2}};
  for (const auto& [nodes, taken_later] : cases) {
    TempDir dir;
    Place place{dir / "out", dir / "local", 1, {0, 0, 1, 1}};
    save_at(place, 1, 4);
    die_before_drain(place, 2, 4);
    place.nodes = nodes;
    const int num_ranks = static_cast<int>(nodes.size());
    EXPECT_EQ(resume_at(place, num_ranks), 1);
    EXPECT_EQ(committed_steps(place.out), std::vector<std::int64_t>{1});
    EXPECT_FALSE(fs::exists(place.out / "checkpoint-2.partial"));
    // The run goes on without it; what the lost node still holds disturbs nobody when it is back.
    die_before_drain(place, 3, num_ranks);
    place.nodes = {0, 1};
    EXPECT_EQ(resume_at(place, 2), taken_later);
  }
}

TEST(LocalStage, ANodeWhosePartIsNotWholeOrDamagedMeansTheCommittedCheckpoint) {
  for (const bool is_damaged : {false, true}) {
    TempDir dir;
    const Place place{dir / "out", dir / "local", 1, {0, 0, 1, 1}};
    save_at(place, 1, 4);
    die_before_drain(place, 2, 4);
    int spoiled = 0;
    for (const fs::path& file : files_below(dir / "local/node-1")) {
      if (file.filename() != "shard-00003-of-00004.h5") continue;
      if (is_damaged)
        std::fstream(file, std::ios::in | std::ios::out).seekp(50'000) << "x";
      else  // its node died a moment earlier
        fs::rename(file.parent_path(), file.parent_path().string() + ".partial");
      ++spoiled;
    }
    EXPECT_EQ(spoiled, 1);
    EXPECT_EQ(resume_at(place, 4), 1);
    EXPECT_EQ(committed_steps(place.out), std::vector<std::int64_t>{1});
    EXPECT_FALSE(fs::exists(place.out / "checkpoint-2.partial"));
  }
}

TEST(LocalStage, ALocalDirectoryThatCannotBeMadeIsNamed) {
  TempDir dir;
  std::ofstream(dir / "file") << "x";
  run_thread_ranks(2, [&](Communicator& comm) {
    try {
      CheckpointStore(dir / "out", comm, 1, 1, dir / "file/local");
      ADD_FAILURE();
    } catch (const Error& e) {
      EXPECT_EQ(e.kind(), ErrorKind::io);
      EXPECT_NE(std::string(e.what()).find("--checkpoint_local_dir"), std::string::npos) << e.what();
    }
  });
}

}  // namespace
}  // namespace shardtune
