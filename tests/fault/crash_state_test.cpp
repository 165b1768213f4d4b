// The system calls of a save are recorded; what a power loss at any of them may leave on the disk is rebuilt, and
// always the old or the new checkpoint is there, whole. SHARDTUNE_CRASH_STATES sets how many states are tried (2500,
// of the longer ways 1000).
#include <cstdlib>
#include <fstream>
#include <functional>
#include <map>

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/file.hpp"
#include "distributed/comm/communicator.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"
#include "tests/fault/crash_model.hpp"
#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;

// How the saves go to the disk; all that they change lies below `root`.
struct Way {
  fs::path root;
  bool is_compressed = false, is_local = false, is_first = false;

  fs::path out() const { return root / (is_first ? "new/out" : "out"); }
  fs::path local() const { return is_local ? root / "local" : fs::path(); }
};

void run_saves(const Way& way, int step, const std::string& environment) {
  const auto result = testing_support::run_command(
      fmt::format("{} {} {} 2 {} {} 1 continue 1 {} {}", environment, std::getenv("SHARDTUNE_SAVE_LOOP"),
                  way.out().string(), step, step, way.is_compressed ? "zstd" : "none", way.local().string()));
  ASSERT_EQ(result.exit_code, 0) << result.output;
}

// Whether the checkpoint has the bits of its step.
bool is_right(const Way& way, const fs::path& checkpoint, std::int64_t step) {
  const auto tensors = test_tensors(1);
  const auto comm = make_self_communicator();
  StateView view = blank_state(tensors, 0, 1);
  CheckpointStore(way.out(), *comm).load(checkpoint, view);
  return difference(view, tensors, step, 0, 1).empty();
}

// The step of the newest checkpoint that verifies; its content is compared bit for bit. 0 = none, -1 = wrong content.
std::int64_t newest_whole(const Way& way) {
  for (const CheckpointInfo& info : list_checkpoints(way.out()))
    if (info.is_committed && verify_checkpoint(info.directory).empty())
      return is_right(way, info.directory, info.step) ? info.step : -1;
  return 0;
}

// The same of a job that starts now and looks at the local disk as well.
std::int64_t newest_for_a_job(const Way& way) {
  const auto comm = make_self_communicator();
  const fs::path found = CheckpointStore(way.out(), *comm, 1, 1, way.local()).newest_usable();
  if (found.empty()) return 0;
  const std::int64_t step = std::stoll(found.filename().string().substr(std::string("checkpoint-").size()));
  return is_right(way, found, step) ? step : -1;
}

class CrashStates : public testing::Test {
 protected:
  // Checkpoint 1 is there; the save of checkpoint 2, which then deletes 1, is recorded.
  void record(bool is_compressed, bool is_local) {
    way_.is_compressed = is_compressed, way_.is_local = is_local;
    run_saves(way_, 1, "");
    record_save_of(2);
  }
  // The first save of all, into a directory that is not there yet.
  void record_first() {
    way_.is_first = true;
    fs::create_directories(way_.root);
    record_save_of(1);
  }
  void record_save_of(int step) {
    old_ = step - 1, new_ = step;
    const fs::path out = way_.out(), published = out / fmt::format("checkpoint-{}", step);
    fs::copy(way_.root, dir_ / "before", fs::copy_options::recursive);
    run_saves(way_, step,
              fmt::format("SHIM_DIR={} SHIM_LOG={}/log LD_PRELOAD={}", way_.root.string(), dir_.path().string(),
                          std::getenv("SHARDTUNE_IO_SHIM")));
    records_ = read_io_log(dir_ / "log");
    for (std::size_t i = 0; i < records_.size(); ++i) {
      if (records_[i].operation == IoOperation::rename && records_[i].b == published.string()) published_ = i;
      if (published_ != 0 && committed_ == 0 && records_[i].operation == IoOperation::sync &&
          records_[i].a == out.string())
        committed_ = i;
    }
    ASSERT_GT(records_.size(), 50u);
    ASSERT_GT(committed_, published_);
    ASSERT_GT(published_, 40u);
  }

  // Tries `wanted` states, spread over all moments. Returns how many broke the promise.
  int count_losses(int wanted, const std::function<bool(const IoRecord&)>& happens) {
    int tried = 0, lost = 0;
    std::mt19937 random(7);
    const auto restore = [&](const fs::path& from) {
      fs::remove_all(way_.root);
      fs::copy(from, way_.root, fs::copy_options::recursive);
    };
    restore(dir_ / "before");
    CrashModel model(way_.root);
    const int per_moment = wanted / static_cast<int>(records_.size()) + 1;
    for (std::size_t done = 0; done <= records_.size(); ++done) {
      for (int i = 0; i < per_moment; ++i) {
        fs::remove_all(way_.root);  // the state lies where the files were: a local disk knows whose it is by the path
        model.write_state(random, way_.root);
        const std::int64_t newest = newest_whole(way_);
        bool is_kept = newest == new_ || (newest == old_ && done <= committed_);
        if (newest == new_ && done <= published_) is_kept = false;
        if (way_.is_local) {
          const std::int64_t resumed = newest_for_a_job(way_);
          is_kept = is_kept && resumed >= newest && resumed <= new_;
          ++resumed_[resumed];
        }
        if (!is_kept) ++lost;
        found_[newest]++;
        ++tried;
      }
      if (done < records_.size() && happens(records_[done])) model.apply(records_[done]);
    }
    EXPECT_GE(tried, wanted);
    std::printf("  %d states at %zu moments: %d with the old checkpoint, %d with the new one, %d bad\n", tried,
                records_.size() + 1, found_[old_], found_[new_], lost);
    if (way_.is_local)
      std::printf("  with the local disk: %d the old one, %d the new one\n", resumed_[old_], resumed_[new_]);
    return lost;
  }
  void expect_no_loss(int by_default) {
    const char* wanted = std::getenv("SHARDTUNE_CRASH_STATES");
    EXPECT_EQ(count_losses(wanted != nullptr ? std::atoi(wanted) : by_default, [](const IoRecord&) { return true; }),
              0);
    EXPECT_GT(found_[old_], 100);
    EXPECT_GT(found_[new_], way_.is_first ? 50 : 100);
  }

  TempDir dir_;
  Way way_{.root = dir_ / "all"};
  std::vector<IoRecord> records_;
  std::size_t published_ = 0, committed_ = 0;
  std::int64_t old_ = 0, new_ = 0;  // steps; 0: no checkpoint
  std::map<std::int64_t, int> found_, resumed_;
};

TEST_F(CrashStates, AlwaysHoldTheOldOrTheNewCheckpoint) {
  record(false, false);
  expect_no_loss(2500);
}

TEST_F(CrashStates, ACompressedSaveLosesNothing) {
  record(true, false);
  expect_no_loss(1000);
}

TEST_F(CrashStates, TheFirstSaveIntoANewDirectoryIsThereOnceItIsCommitted) {
  record_first();
  expect_no_loss(1000);
}

// More states hold the new one then: it is whole on the local disk before it is drained.
TEST_F(CrashStates, ASaveThroughALocalDiskLosesNothing) {
  record(false, true);
  expect_no_loss(1000);
  EXPECT_GT(resumed_[2], found_[2]);
}

// The test is worth something only if it sees a missing sync: of a shard, of a directory, of the manifest.
TEST_F(CrashStates, AMissingSyncIsSeen) {
  record(false, false);
  for (const std::string missing : {".h5.tmp", "/checkpoint-2.partial", "manifest.json.tmp", "/out"}) {
    found_.clear();
    EXPECT_GT(count_losses(1000,
                           [&](const IoRecord& record) {
                             return record.operation != IoOperation::sync || !record.a.ends_with(missing);
                           }),
              0)
        << missing;
  }
}

TEST_F(CrashStates, AMissingSyncOfTheNewDirectorysNameIsSeen) {
  record_first();
  for (const fs::path& missing : {way_.root, way_.root / "new"}) {
    found_.clear();
    EXPECT_GT(count_losses(1000,
                           [&](const IoRecord& record) {
                             return record.operation != IoOperation::sync || record.a != missing.string();
                           }),
              0)
        << missing;
  }
}

}  // namespace
}  // namespace shardtune
