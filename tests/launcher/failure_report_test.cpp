// A failure that all ranks share is reported once, however late the launcher ends the others.
#include "launcher/failure_report.hpp"

#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {
namespace fs = std::filesystem;

TEST(FailureReport, TheFirstOfAJobClaimsAMessage) {
  const fs::path job = testing_support::fresh_directory("failure_report");
  EXPECT_TRUE(claim_failure_report(job, "disk full"));
  EXPECT_FALSE(claim_failure_report(job, "disk full"));
  EXPECT_TRUE(claim_failure_report(job, "no such file")) << "another failure is not hidden";
  EXPECT_FALSE(claim_failure_report(job, "disk full"));
  fs::remove_all(job);
}

TEST(FailureReport, WithoutADirectoryEveryoneSpeaks) {
  EXPECT_TRUE(claim_failure_report("", "x"));
  EXPECT_TRUE(claim_failure_report("", "x"));
  EXPECT_TRUE(claim_failure_report("/nonexistent/job", "x"));
  EXPECT_TRUE(claim_failure_report("/nonexistent/job", "x"));
}

TEST(FailureReport, RanksOfOneJobShareADirectoryThatEndsWithIt) {
  const auto result = testing_support::run_command(
      testing_support::mpirun_command(2) + " sh -c 'test -d \"$PMIX_SERVER_TMPDIR\" && echo dir=$PMIX_SERVER_TMPDIR'");
  ASSERT_EQ(result.exit_code, 0) << result.output;
  const auto first = result.output.find("dir=");
  ASSERT_NE(first, std::string::npos) << result.output;
  const std::string line = result.output.substr(first, result.output.find('\n', first) - first);
  EXPECT_NE(result.output.find(line, first + 1), std::string::npos) << result.output;
  EXPECT_FALSE(fs::exists(line.substr(4)));
}

}  // namespace
}  // namespace shardtune
