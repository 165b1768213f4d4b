// Saves that are killed or run out of space, in a process of their own (save_loop).
#include <cstdlib>
#include <map>
#include <random>
#include <sstream>

#include <fcntl.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <poll.h>
#include <sys/mount.h>
#include <sys/wait.h>
#include <unistd.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "distributed/comm/communicator.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"

namespace shardtune {
namespace {

struct Child {
  pid_t pid = -1;
  UniqueFd out;
};

Child start_loop(std::vector<std::string> arguments, const std::filesystem::path& errors) {
  int ends[2];
  if (::pipe2(ends, O_CLOEXEC) != 0) throw std::runtime_error("pipe2");
  arguments.insert(arguments.begin(), std::getenv("SHARDTUNE_SAVE_LOOP"));
  std::vector<char*> argv;
  for (std::string& argument : arguments) argv.push_back(argument.data());
  argv.push_back(nullptr);
  const pid_t pid = ::fork();
  if (pid == 0) {
    const int error_fd = ::open(errors.c_str(), O_WRONLY | O_CREAT | O_TRUNC, 0644);
    ::dup2(ends[1], STDOUT_FILENO);
    ::dup2(error_fd, STDERR_FILENO);
    ::execv(argv[0], argv.data());
    ::_exit(127);
  }
  ::close(ends[1]);
  return {pid, UniqueFd(ends[0])};
}

int wait_for(const Child& child) {
  int status = 0;
  ::waitpid(child.pid, &status, 0);
  return status;
}

std::string load_everything(const std::filesystem::path& checkpoint, std::int64_t step,
                            const std::vector<TestTensor>& tensors) {
  const auto comm = make_self_communicator();
  StateView view = blank_state(tensors, 0, 1);
  CheckpointStore(checkpoint.parent_path(), *comm).load(checkpoint, view);
  return difference(view, tensors, step, 0, 1);
}

std::int64_t newest_committed(const std::filesystem::path& dir) {
  for (const CheckpointInfo& info : list_checkpoints(dir))
    if (info.is_committed) return info.step;
  return 0;
}

TEST(KilledSave, LeavesTheLastCommittedCheckpointWholeSixtyTimes) {
  TempDir dir;
  const auto out = dir / "out";
  const std::int64_t scale = 40;
  const auto tensors = test_tensors(scale);
  std::mt19937 random(2024);
  std::map<std::string, int> hits;
  int inside_saves = 0;
  for (int kill = 0; kill < 60; ++kill) {
    const std::int64_t first = newest_committed(out) + 1;
    const Child child = start_loop({out, "2", std::to_string(first), "1000000", std::to_string(scale)}, dir / "errors");
    // The moment is a number of phases plus up to 2 ms.
    int phases = static_cast<int>(random() % 160);
    std::string text;
    char buffer[256];
    while (phases > 0) {
      const ssize_t got = ::read(child.out.get(), buffer, sizeof(buffer));
      ASSERT_GT(got, 0) << "the loop ended by itself: " << read_file(dir / "errors");
      text.append(buffer, static_cast<std::size_t>(got));
      phases -= static_cast<int>(std::count(buffer, buffer + got, '\n'));
    }
    const timespec extra{0, static_cast<long>(random() % 2'000'000)};
    ::ppoll(nullptr, 0, &extra, nullptr);
    ::kill(child.pid, SIGKILL);
    const int status = wait_for(child);
    ASSERT_TRUE(WIFSIGNALED(status)) << read_file(dir / "errors");
    for (ssize_t got; (got = ::read(child.out.get(), buffer, sizeof(buffer))) > 0;)
      text.append(buffer, static_cast<std::size_t>(got));

    std::int64_t announced = first - 1;
    std::string phase, last_phase = "start";
    std::int64_t step = 0;
    for (std::istringstream lines(text); lines >> phase >> step;) {
      last_phase = phase;
      if (phase == "directory_renamed") announced = step;
    }
    ++hits[last_phase];
    inside_saves += last_phase != "start" && last_phase != "pruned";
    const std::int64_t newest = newest_committed(out);
    EXPECT_GE(newest, announced) << "a committed checkpoint was lost after " << last_phase;
    for (const CheckpointInfo& info : list_checkpoints(out)) {
      EXPECT_EQ(info.problem, "") << last_phase;
      EXPECT_TRUE(verify_checkpoint(info.directory).empty()) << info.directory << " after " << last_phase;
    }
    if (newest > 0) {
      EXPECT_EQ(load_everything(out / fmt::format("checkpoint-{}", newest), newest, tensors), "") << last_phase;
    }
  }
  for (const auto& [phase, count] : hits) std::printf("  killed after %-20s %d\n", phase.c_str(), count);
  std::printf("  inside saves: %d of 60, newest step %ld\n", inside_saves, static_cast<long>(newest_committed(out)));
  EXPECT_GE(inside_saves, 15);
  EXPECT_GT(newest_committed(out), 10);
}

// Three saves fit, then the space ends: exit code of io, the message names rank, file and reason, and nothing is lost.
// `file` is part of the name of the file that has to be named.
void expect_clean_failure(const std::filesystem::path& out, const std::filesystem::path& errors, int status,
                          const std::string& reason, const std::string& file = "shard-") {
  ASSERT_TRUE(WIFEXITED(status)) << "signal " << WTERMSIG(status);
  const std::string said = read_file(errors);
  EXPECT_EQ(WEXITSTATUS(status), exit_code(ErrorKind::io)) << said;
  EXPECT_NE(said.find("saving checkpoint-"), std::string::npos) << said;
  EXPECT_NE(said.find("failed on rank "), std::string::npos) << said;
  EXPECT_NE(said.find(reason), std::string::npos) << said;
  EXPECT_NE(said.find(file), std::string::npos) << said;
  EXPECT_EQ(std::count(said.begin(), said.end(), '\n'), 1) << said;
  for (const auto& entry : std::filesystem::directory_iterator(out))
    EXPECT_NE(entry.path().extension(), ".partial") << entry.path();
}

TEST(FullDisk, AFileSizeLimitIsACleanFailureAndKeepsTheOldCheckpoints) {
  TempDir dir;
  const auto out = dir / "out";
  const Child good = start_loop({out, "2", "1", "2", "40"}, dir / "errors");
  ASSERT_EQ(wait_for(good), 0) << read_file(dir / "errors");
  // The smaller of the two shards; limits just below it fail when HDF5 writes its last metadata.
  const auto size = std::min(std::filesystem::file_size(out / "checkpoint-2/shard-00000-of-00002.h5"),
                             std::filesystem::file_size(out / "checkpoint-2/shard-00001-of-00002.h5"));
  ASSERT_GT(size, 60'000U);
  for (const std::uintmax_t limit :
       {std::uintmax_t{800}, std::uintmax_t{2500}, size / 4, size / 2, size - 5000, size - 100, size - 1}) {
    const Child child = start_loop({out, "2", "3", "3", "40", std::to_string(limit)}, dir / "errors");
    expect_clean_failure(out, dir / "errors", wait_for(child), "File too large");
    EXPECT_EQ(newest_committed(out), 2);
  }
  for (std::int64_t step : {1, 2}) {
    EXPECT_TRUE(verify_checkpoint(out / fmt::format("checkpoint-{}", step)).empty());
    EXPECT_EQ(load_everything(out / fmt::format("checkpoint-{}", step), step, test_tensors(40)), "");
  }
}

TEST(FullDisk, TheSameProcessCanSaveAgainWhenThereIsSpace) {
  for (const char* limit : {"800", "3000", "20000", "50000"}) {
    TempDir dir;
    const auto out = dir / "out";
    const Child child = start_loop({out, "2", "1", "3", "40", limit, "retry"}, dir / "errors");
    expect_clean_failure(out, dir / "errors", wait_for(child), "File too large");
    EXPECT_EQ(newest_committed(out), 3) << limit;
    EXPECT_TRUE(verify_checkpoint(out / "checkpoint-3").empty());
    EXPECT_EQ(load_everything(out / "checkpoint-3", 3, test_tensors(40)), "");
  }
}

TEST(FullDisk, AFullFileSystemIsACleanFailureAndKeepsTheOldCheckpoints) {
  TempDir dir;
  const auto mounted = dir / "small";
  std::filesystem::create_directory(mounted);
  if (::mount("tmpfs", mounted.c_str(), "tmpfs", 0, "size=3m") != 0)
    GTEST_SKIP() << "mounting a tmpfs is not permitted here; the file size limit test covers the same path";
  const auto out = mounted / "out";
  // One checkpoint takes about 1.1 MB: with two kept, the third does not fit.
  const Child child = start_loop({out, "2", "1", "50", "200"}, dir / "errors");
  const int status = wait_for(child);
  // Both ranks fail and the lowest is quoted: rank 0's shard may have been the last to fit, so that its next file
  // fails.
  expect_clean_failure(out, dir / "errors", status, "No space left on device", ".partial/");
  const std::int64_t newest = newest_committed(out);
  EXPECT_GE(newest, 1);
  EXPECT_TRUE(verify_checkpoint(out / fmt::format("checkpoint-{}", newest)).empty());
  EXPECT_EQ(load_everything(out / fmt::format("checkpoint-{}", newest), newest, test_tensors(200)), "");
  EXPECT_EQ(::umount2(mounted.c_str(), MNT_DETACH), 0);
}

}  // namespace
}  // namespace shardtune
