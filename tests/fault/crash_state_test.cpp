// The system calls of a save are recorded; what a power loss at any of them may leave on the disk is rebuilt, and
// always the old or the new checkpoint is there, whole. SHARDTUNE_CRASH_STATES sets how many states are tried (2500).
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

void run_saves(const fs::path& out, int first, int last, const std::string& environment) {
  const auto result = testing_support::run_command(fmt::format(
      "{} {} {} 2 {} {} 1 continue 1", environment, std::getenv("SHARDTUNE_SAVE_LOOP"), out.string(), first, last));
  ASSERT_EQ(result.exit_code, 0) << result.output;
}

// The step of the newest checkpoint that verifies; its content is compared bit for bit. 0 = none, -1 = wrong content.
std::int64_t newest_whole(const fs::path& out) {
  const auto tensors = test_tensors(1);
  for (const CheckpointInfo& info : list_checkpoints(out)) {
    if (!info.is_committed || !verify_checkpoint(info.directory).empty()) continue;
    const auto comm = make_self_communicator();
    StateView view = blank_state(tensors, 0, 1);
    CheckpointStore(out, *comm).load(info.directory, view);
    return difference(view, tensors, info.step, 0, 1).empty() ? info.step : -1;
  }
  return 0;
}

class CrashStates : public testing::Test {
 protected:
  // Checkpoint 1 is there; the save of checkpoint 2, which then deletes 1, is recorded.
  void SetUp() override {
    run_saves(out_, 1, 1, "");
    fs::create_directories(dir_ / "before");
    fs::copy(out_, dir_ / "before/out", fs::copy_options::recursive);
    run_saves(out_, 2, 2,
              fmt::format("SHIM_DIR={} SHIM_LOG={}/log LD_PRELOAD={}", out_.string(), dir_.path().string(),
                          std::getenv("SHARDTUNE_IO_SHIM")));
    records_ = read_io_log(dir_ / "log");
    fs::remove_all(out_);
    fs::rename(dir_ / "before/out", out_);  // the model starts from here
    for (std::size_t i = 0; i < records_.size(); ++i) {
      if (records_[i].operation == IoOperation::rename && records_[i].b == (out_ / "checkpoint-2").string())
        published_ = i;
      if (published_ != 0 && committed_ == 0 && records_[i].operation == IoOperation::sync &&
          records_[i].a == out_.string())
        committed_ = i;
    }
    ASSERT_GT(records_.size(), 60u);
    ASSERT_GT(committed_, published_);
    ASSERT_GT(published_, 40u);
  }

  // Tries `wanted` states, spread over all moments. Returns how many broke the promise.
  int count_losses(int wanted, const std::function<bool(const IoRecord&)>& happens) {
    int tried = 0, lost = 0;
    std::mt19937 random(7);
    CrashModel model(out_);
    const int per_moment = wanted / static_cast<int>(records_.size()) + 1;
    for (std::size_t done = 0; done <= records_.size(); ++done) {
      for (int i = 0; i < per_moment; ++i) {
        const fs::path state = dir_ / "state";
        fs::remove_all(state);
        model.write_state(random, state);
        const std::int64_t newest = newest_whole(state);
        const bool is_kept = newest == 2 || (newest == 1 && done <= committed_);
        if (!is_kept || (newest == 2 && done <= published_)) ++lost;
        found_[newest]++;
        ++tried;
      }
      if (done < records_.size() && happens(records_[done])) model.apply(records_[done]);
    }
    EXPECT_GE(tried, wanted);
    std::printf("  %d states at %zu moments: %d with the old checkpoint, %d with the new one, %d bad\n", tried,
                records_.size() + 1, found_[1], found_[2], lost);
    return lost;
  }

  TempDir dir_;
  const fs::path out_ = dir_ / "out";
  std::vector<IoRecord> records_;
  std::size_t published_ = 0, committed_ = 0;
  std::map<std::int64_t, int> found_;
};

TEST_F(CrashStates, AlwaysHoldTheOldOrTheNewCheckpoint) {
  const char* wanted = std::getenv("SHARDTUNE_CRASH_STATES");
  EXPECT_EQ(count_losses(wanted != nullptr ? std::atoi(wanted) : 2500, [](const IoRecord&) { return true; }), 0);
  EXPECT_GT(found_[1], 100);
  EXPECT_GT(found_[2], 100);
}

// The test is worth something only if it sees a missing sync: of a shard, of a directory, of the manifest.
TEST_F(CrashStates, AMissingSyncIsSeen) {
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

}  // namespace
}  // namespace shardtune
