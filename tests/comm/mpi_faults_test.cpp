// How jobs end: exit code of mpirun, time and messages. Starts mpirun itself, so it does not run under it.
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include <gtest/gtest.h>
#include <sys/wait.h>

namespace {

struct Outcome {
  int exit_code;
  double seconds;
  std::string output;
};

std::size_t count(const std::string& text, const std::string& part) {
  std::size_t found = 0;
  for (std::size_t at = text.find(part); at != std::string::npos; at = text.find(part, at + 1)) ++found;
  return found;
}

// `timeout` makes a hang a failure of its own (exit code 124).
Outcome run_job(const std::string& environment, int num_ranks, const std::string& fault,
                const std::string& wrapper = "") {
  const char* mpirun = std::getenv("SHARDTUNE_MPIRUN");
  const char* program = std::getenv("SHARDTUNE_MPI_FAULTS");
  if (mpirun == nullptr || program == nullptr) return {-1, 0, "run this test through ctest"};
  std::string launcher;
  if (num_ranks > 0) launcher = std::string(mpirun) + " -n " + std::to_string(num_ranks) + " ";
  const std::string command =
      environment + " timeout -k 5 30 " + wrapper + " " + launcher + program + " " + fault + " 2>&1";
  const auto start = std::chrono::steady_clock::now();
  std::FILE* pipe = popen(command.c_str(), "r");
  if (pipe == nullptr) return {-1, 0, "popen failed"};
  Outcome outcome{0, 0, {}};
  std::array<char, 4096> buffer;
  while (const std::size_t got = std::fread(buffer.data(), 1, buffer.size(), pipe)) outcome.output.append(buffer.data(), got);
  const int status = pclose(pipe);
  outcome.exit_code = WIFEXITED(status) ? WEXITSTATUS(status) : -1;
  outcome.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  std::printf("%s, %d ranks: exit code %d after %.1f s, %zu lines\n", fault.c_str(), num_ranks, outcome.exit_code,
              outcome.seconds, count(outcome.output, "\n"));
  return outcome;
}

TEST(MpiJob, WithoutFaultEndsQuietlyWithAndWithoutMpirun) {
  for (const int num_ranks : {0, 1, 3}) {
    const Outcome outcome = run_job("", num_ranks, "none");
    EXPECT_EQ(outcome.exit_code, 0);
    EXPECT_EQ(outcome.output, "");
  }
}

class MpiJobFault : public testing::TestWithParam<const char*> {};
INSTANTIATE_TEST_SUITE_P(Faults, MpiJobFault, testing::Values("abort", "abort-while-communicating"));

TEST_P(MpiJobFault, EndsAllRanksWithTheCodeOfTheRankThatAborts) {
  const Outcome outcome = run_job("", 3, GetParam());
  EXPECT_EQ(outcome.exit_code, 7) << outcome.output;
  EXPECT_LT(outcome.seconds, 20) << outcome.output;
  EXPECT_LT(count(outcome.output, "\n"), 20U) << outcome.output;
}

TEST(MpiJob, OfARankThatThrowsEndsWithItsMessageOnceAndItsCode) {
  const Outcome outcome = run_job("", 3, "throw");
  EXPECT_EQ(outcome.exit_code, 3) << outcome.output;
  EXPECT_LT(outcome.seconds, 20) << outcome.output;
  EXPECT_EQ(count(outcome.output, "rank 2: row 17 is broken"), 1U) << outcome.output;
}

TEST(MpiJob, WithoutMpirunAbortsWithItsCode) {
  const Outcome outcome = run_job("", 0, "abort");
  EXPECT_EQ(outcome.exit_code, 7) << outcome.output;
}

TEST(MpiJob, NamesRanksAndOperationsWhenCollectivesDifferAndTheGuardIsOn) {
  const Outcome outcome = run_job("SHARDTUNE_CHECK_COLLECTIVES=1", 3, "mismatch");
  EXPECT_EQ(outcome.exit_code, 5) << outcome.output;
  EXPECT_NE(outcome.output.find("the ranks call different collectives: rank 0 #1 all_reduce Float [1000], rank 1 #1 "
                                "all_reduce Float [1000], rank 2 #1 broadcast Float [1000]"),
            std::string::npos) << outcome.output;
}

TEST(MpiJob, OfARankThatIsKilledEndsWhileTheOthersWaitInSharedMemory) {
  const Outcome outcome = run_job("SHARDTUNE_COMM=shm", 3, "die");
  EXPECT_EQ(outcome.exit_code, 137) << outcome.output;
  EXPECT_LT(outcome.seconds, 20) << outcome.output;
}

TEST(MpiJob, OfARankThatHangsEndsAtTheDeadlineNamingItAndTheOperation) {
  const Outcome outcome = run_job("SHARDTUNE_COMM=shm SHARDTUNE_COMM_TIMEOUT=1", 3, "hang");
  EXPECT_EQ(outcome.exit_code, 5) << outcome.output;
  EXPECT_LT(outcome.seconds, 20) << outcome.output;
  EXPECT_NE(outcome.output.find("of 3 has waited 1 s for rank 2"), std::string::npos) << outcome.output;
  EXPECT_NE(outcome.output.find("all_reduce: rank "), std::string::npos) << outcome.output;
}

TEST(MpiJob, NamesRanksAndOperationsInSharedMemoryEvenWithoutTheGuard) {
  const Outcome outcome = run_job("SHARDTUNE_COMM=shm", 3, "mismatch");
  EXPECT_EQ(outcome.exit_code, 5) << outcome.output;
  EXPECT_NE(outcome.output.find("rank 1 all_reduce [4000 bytes], rank 2 broadcast"), std::string::npos)
      << outcome.output;
}

// In a mount namespace of its own, as in a container; empty where making one is not allowed.
std::string with_shared_memory_of(const std::string& size) {
  for (const std::string unshare : {"unshare -m", "unshare -rm"}) {
    const std::string mount = " sh -c 'mount -t tmpfs -o size=" + size + " tmpfs /dev/shm";
    if (std::system((unshare + mount + "' 2>/dev/null").c_str()) == 0) return unshare + mount + " && exec \"$@\"' sh";
  }
  return "";
}

class SmallSharedMemory : public testing::Test {
 protected:
  static Outcome run(const std::string& size, const std::string& environment) {
    // Open MPI keeps files of its own there unless it is told to use sockets.
    return run_job("OMPI_MCA_btl=self,tcp " + environment, 3, "large", with_shared_memory_of(size));
  }
  void SetUp() override {
    if (with_shared_memory_of("64m").empty()) GTEST_SKIP() << "this user may not mount a small /dev/shm";
  }
};

TEST_F(SmallSharedMemory, Of64MebibytesIsEnoughForCollectivesOfAnySize) {
  const Outcome outcome = run("64m", "SHARDTUNE_COMM=auto");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  // Three ranks' buffers of 64 MiB are not: one warning, and an ordinary tensor does.
  EXPECT_EQ(count(outcome.output, "bytes of shared memory in /dev/shm"), 1U) << outcome.output;
}

// All that can be had is taken, and Open MPI's own files there, which it does not reserve, still get theirs.
TEST_F(SmallSharedMemory, IsNeverFilledUp) {
  const Outcome outcome = run_job("SHARDTUNE_COMM=auto", 3, "fill", with_shared_memory_of("64m"));
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
}

TEST_F(SmallSharedMemory, TooSmallForAnythingMeansOneWarningAndMpi) {
  const Outcome outcome = run("100k", "SHARDTUNE_COMM=auto");
  EXPECT_EQ(outcome.exit_code, 0) << outcome.output;
  EXPECT_EQ(count(outcome.output, "The ranks communicate through MPI alone"), 1U) << outcome.output;
}

TEST_F(SmallSharedMemory, TooSmallForAnythingIsANamedErrorWhereItMustBeUsed) {
  const Outcome outcome = run("100k", "SHARDTUNE_COMM=shm");
  EXPECT_EQ(outcome.exit_code, 5) << outcome.output;
  EXPECT_NE(outcome.output.find("only 102400 are free, 16777216 of which are left to others"), std::string::npos)
      << outcome.output;
}

TEST(MpiJob, RefusesSettingsOfCommunicationItDoesNotKnow) {
  for (const char* setting : {"SHARDTUNE_COMM=tcp", "SHARDTUNE_COMM_TIMEOUT=0", "SHARDTUNE_COMM_TIMEOUT=1h"}) {
    const Outcome outcome = run_job(setting, 2, "none");
    EXPECT_EQ(outcome.exit_code, 2) << setting << outcome.output;
    EXPECT_NE(outcome.output.find(std::string(setting, std::strchr(setting, '=')) + " is '"), std::string::npos);
  }
}

TEST(MpiJob, RefusesAGuardSettingItDoesNotKnow) {
  const Outcome outcome = run_job("SHARDTUNE_CHECK_COLLECTIVES=yes", 2, "none");
  EXPECT_EQ(outcome.exit_code, 2) << outcome.output;
  EXPECT_NE(outcome.output.find("SHARDTUNE_CHECK_COLLECTIVES is 'yes'; use 0 or 1"), std::string::npos);
}

TEST(MpiJob, NoticesAMessageOfTheWrongSizeEvenWithoutTheGuard) {
  const Outcome outcome = run_job("", 2, "sizes");
  EXPECT_EQ(outcome.exit_code, 5) << outcome.output;
  EXPECT_LT(outcome.seconds, 20) << outcome.output;
}

}  // namespace
