// How jobs end: exit code of mpirun, time and messages. Starts mpirun itself, so it does not run under it.
#include <array>
#include <chrono>
#include <cstdio>
#include <cstdlib>
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
Outcome run_job(const std::string& environment, int num_ranks, const std::string& fault) {
  const char* mpirun = std::getenv("SHARDTUNE_MPIRUN");
  const char* program = std::getenv("SHARDTUNE_MPI_FAULTS");
  if (mpirun == nullptr || program == nullptr) return {-1, 0, "run this test through ctest"};
  std::string launcher;
  if (num_ranks > 0) launcher = std::string(mpirun) + " -n " + std::to_string(num_ranks) + " ";
  const std::string command = environment + " timeout -k 5 30 " + launcher + program + " " + fault + " 2>&1";
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
