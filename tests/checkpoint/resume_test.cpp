// What a job finds when it starts in a directory that holds checkpoints, and what it leaves of them.
#include <sys/stat.h>

#include <filesystem>
#include <fstream>
#include <mutex>
#include <set>
#include <string>
#include <vector>

#include <gtest/gtest.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"
#include "tests/support/error_of.hpp"

namespace shardtune {
namespace {

TEST(Resume, ResumingMovesLaterCheckpointsAsideAndSweepsTheRest) {
  TempDir dir;
  for (std::int64_t step : {1, 2, 3}) save_test_state(dir.path(), step, 1);
  std::filesystem::create_directories(dir / "checkpoint-9.partial");
  std::filesystem::create_directories(dir / "checkpoint-1.deleting");
  std::filesystem::create_directories(dir / "notes.partial");
  run_thread_ranks(2, [&](Communicator& comm) { CheckpointStore(dir.path(), comm).prepare_resume(1, "run/7"); });
  EXPECT_EQ(committed_steps(dir.path()), (std::vector<std::int64_t>{1}));
  EXPECT_TRUE(std::filesystem::exists(dir / "checkpoint-2.rejected-run_7"));
  EXPECT_TRUE(std::filesystem::exists(dir / "checkpoint-3.rejected-run_7"));
  EXPECT_FALSE(std::filesystem::exists(dir / "checkpoint-9.partial"));
  EXPECT_FALSE(std::filesystem::exists(dir / "checkpoint-1.deleting"));
  EXPECT_TRUE(std::filesystem::exists(dir / "notes.partial"));
  save_test_state(dir.path(), 2, 2);
  EXPECT_TRUE(verify_checkpoint(dir / "checkpoint-2").empty());
}

TEST(Resume, NewestUsableSkipsWhatDoesNotVerify) {
  TempDir dir;
  for (std::int64_t step : {10, 20, 100}) save_test_state(dir.path(), step, 2);
  std::filesystem::create_directories(dir / "checkpoint-200");  // never committed
  const auto newest = [&] {
    std::mutex mutex;
    std::set<std::string> found;
    run_thread_ranks(3, [&](Communicator& comm) {
      const std::string path = CheckpointStore(dir.path(), comm).newest_usable().filename();
      const std::lock_guard lock(mutex);
      found.insert(path);
    });
    EXPECT_EQ(found.size(), 1u);
    return *found.begin();
  };
  EXPECT_EQ(newest(), "checkpoint-100");
  std::filesystem::remove(dir / "checkpoint-100/shard-00001-of-00002.h5");
  EXPECT_EQ(newest(), "checkpoint-20");
  std::ofstream(dir / "checkpoint-20/manifest.json", std::ios::app) << " ";
  EXPECT_EQ(newest(), "checkpoint-10");
  std::filesystem::remove(dir / "checkpoint-10/manifest.json");
  EXPECT_EQ(newest(), "");
}

// What the system refuses to open (here a socket, in earnest a disk or a server that fails for a moment) may be good.
TEST(Resume, WhatCannotBeReadIsSkippedButNotSetAside) {
  TempDir dir;
  for (std::int64_t step : {10, 20, 30, 40}) save_test_state(dir.path(), step, 2);
  const auto hide = [&](const std::string& name) {
    std::filesystem::rename(dir / name, dir / (name + ".hidden"));
    ASSERT_EQ(::mknod((dir / name).c_str(), S_IFSOCK | 0600, 0), 0);
  };
  const auto resume = [&] {
    std::string path;
    run_thread_ranks(2, [&](Communicator& comm) {
      CheckpointStore store(dir.path(), comm);
      const std::string found = store.newest_usable().filename();
      if (!found.empty()) store.prepare_resume(std::stoll(found.substr(11)), "next");
      if (comm.rank() == 0) path = found;
    });
    return path;
  };
  hide("checkpoint-40/manifest.json");
  hide("checkpoint-30/shard-00001-of-00002.h5");
  std::filesystem::remove(dir / "checkpoint-20/shard-00001-of-00002.h5");  // damage
  EXPECT_EQ(resume(), "checkpoint-10");
  EXPECT_TRUE(std::filesystem::exists(dir / "checkpoint-20.rejected-next"));
  EXPECT_TRUE(std::filesystem::exists(dir / "checkpoint-30"));
  std::filesystem::remove_all(dir / "checkpoint-10");
  EXPECT_NE(testing_support::error_of(ErrorKind::io, resume).find("cannot be read now"), std::string::npos);
  for (const std::string name : {"checkpoint-30/shard-00001-of-00002.h5", "checkpoint-40/manifest.json"}) {
    std::filesystem::rename(dir / (name + ".hidden"), dir / name);
    EXPECT_EQ(resume(), name.substr(0, 13));
  }
}

}  // namespace
}  // namespace shardtune
