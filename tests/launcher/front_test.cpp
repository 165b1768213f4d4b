// What the front program settles before the real one starts. A script that prints its environment stands for that.
#include <cstdlib>
#include <filesystem>
#include <fstream>
#include <string>

#include <fmt/format.h>
#include <gtest/gtest.h>
#include <sched.h>
#include <sys/wait.h>
#include <unistd.h>

#include "core/huge_pages.hpp"
#include "tests/support/tiny_run.hpp"

namespace shardtune {
namespace {

using testing_support::fresh_directory;

class Front : public ::testing::Test {
 protected:
  void SetUp() override {
    std::filesystem::create_directory(folder_ / "libexec");
    std::filesystem::copy_file(testing_support::shardtune_binary(), folder_ / "shardtune");
    const auto program = folder_ / "libexec" / "shardtune";
    std::ofstream(program) << "#!/bin/sh\nenv\n";
    std::filesystem::permissions(program, std::filesystem::perms::owner_all);
    cpu_set_t mask;
    CPU_ZERO(&mask);
    ASSERT_EQ(::sched_getaffinity(0, sizeof mask, &mask), 0);
    cores_ = CPU_COUNT(&mask);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  // How the threads of a program started so wait: "spin", "sleep" or what the user has said.
  std::string waiting(const std::string& variables, const std::string& arguments = "") const {
    const auto result = testing_support::run_command(
        fmt::format("env -u OMP_NUM_THREADS -u OMP_WAIT_POLICY -u GOMP_SPINCOUNT -u OMPI_COMM_WORLD_LOCAL_SIZE "
                    "-u OMPI_MCA_orte_bound_at_launch {} {} train {}",
                    variables, (folder_ / "shardtune").string(), arguments));
    const std::string lines = "\n" + result.output;
    const bool spins = lines.find("\nGOMP_SPINCOUNT=10000\n") != std::string::npos,
               sleeps = lines.find("\nOMP_WAIT_POLICY=passive\n") != std::string::npos;
    if (spins != sleeps) return spins ? "spin" : "sleep";
    return lines;
  }

  // The CPUs that a program may use: what follows the name in its status.
  static std::string allowed(const std::string& command) {
    const auto result = testing_support::run_command(command);
    EXPECT_EQ(result.exit_code, 0) << result.output;
    const std::string name = "Cpus_allowed_list:";
    const auto at = result.output.rfind(name);
    if (at == std::string::npos) return result.output;
    return result.output.substr(at + name.size(), result.output.find('\n', at) - at - name.size());
  }

  const std::filesystem::path folder_ = fresh_directory("front");
  int cores_ = 0;
};

TEST_F(Front, ThreadsSpinForAMomentWhereTheyFitTheCores) {
  EXPECT_EQ(waiting(""), "spin");
  EXPECT_EQ(waiting("OMPI_COMM_WORLD_LOCAL_SIZE=64"), "spin") << "the program shares the cores out";
  EXPECT_EQ(waiting(fmt::format("OMP_NUM_THREADS={}", cores_)), "spin");
  EXPECT_EQ(waiting(fmt::format("OMP_NUM_THREADS={}", cores_ + 1)), "sleep");
  EXPECT_EQ(waiting("OMPI_COMM_WORLD_LOCAL_SIZE=2", fmt::format("--num_threads {}", cores_)),
            cores_ == 1 ? "spin" : "sleep");
  EXPECT_EQ(waiting("", fmt::format("--num_threads={}", cores_ + 1)), "sleep");
  EXPECT_EQ(waiting("", fmt::format("--num_threads={} --seed 1", cores_)), "spin");
  EXPECT_EQ(waiting("", "--num_threads"), "spin") << "the program will refuse it";
}

TEST_F(Front, TheNumberOfThreadsMayStandInAConfigurationToo) {
  const std::string config = (folder_ / "run.cfg").string(), json = (folder_ / "run.json").string();
  std::ofstream(config) << fmt::format("# num_threads = 1\nnum_train_epochs = 1\n num-threads = \"{}\"\n", cores_ + 1);
  std::ofstream(json) << fmt::format(R"({{"output_dir": "run #3", "num_threads": {}}})", cores_ + 1);
  for (const std::string& file : {config, json}) {
    EXPECT_EQ(waiting("", "--config " + file), "sleep");
    EXPECT_EQ(waiting("", "--config=" + file), "sleep");
    EXPECT_EQ(waiting("", fmt::format("--num_threads {} --config {}", cores_, file)), "spin")
        << "the command line wins";
    EXPECT_EQ(waiting("", "--num_threads 0 --config " + file), "spin") << "though it only names the default";
    EXPECT_EQ(waiting("OMP_NUM_THREADS=1", "--config " + file), "sleep") << "so does the file over the variable";
  }
  EXPECT_EQ(waiting("", "--config " + (folder_ / "missing").string()), "spin") << "the program will refuse it";
  EXPECT_EQ(waiting("", fmt::format("--num-threads={}", cores_ + 1)), "sleep") << "dashes are as good";
  EXPECT_EQ(waiting(fmt::format("OMP_NUM_THREADS={}", cores_ + 1), "--num_threads 0"), "sleep") << "0 is the default";
}

TEST_F(Front, BoundRanksHaveTheirCoresForThemselves) {
  const long online = ::sysconf(_SC_NPROCESSORS_ONLN);
  const std::string full = fmt::format("OMPI_COMM_WORLD_LOCAL_SIZE={} OMP_NUM_THREADS={}", online / cores_, cores_),
                    crowded = fmt::format("OMPI_COMM_WORLD_LOCAL_SIZE={} OMP_NUM_THREADS=2", online + 1);
  EXPECT_EQ(waiting(full + " OMPI_MCA_orte_bound_at_launch=1"), "spin");
  EXPECT_EQ(waiting(crowded + " OMPI_MCA_orte_bound_at_launch=1"), "sleep");
}

TEST_F(Front, OneRankMayUseAllCoresUnlessToldOtherwise) {
  const std::string status = "grep Cpus_allowed_list /proc/self/status",
                    run = "env -u OMP_NUM_THREADS -u OMPI_MCA_hwloc_base_binding_policy mpirun -n 1 ";
  std::ofstream(folder_ / "libexec" / "shardtune") << "#!/bin/sh\n" + status + "\n";
  const std::string program = (folder_ / "shardtune").string() + " train";
  if (cores_ > 1) {
    ASSERT_NE(allowed(run + status), allowed(status)) << "Open MPI's default has changed";
  }
  EXPECT_EQ(allowed(run + program), allowed(status));
  EXPECT_EQ(allowed(run + program + " --num_threads 1"), allowed(run + status))
      << "one thread stays where Open MPI has put it";
  EXPECT_EQ(allowed(run + "--bind-to core " + program), allowed(run + "--bind-to core " + status));
  EXPECT_EQ(allowed(run + "--map-by slot:pe=1 " + program), allowed(run + "--map-by slot:pe=1 " + status));
  EXPECT_EQ(allowed(run + "--map-by slot " + program), allowed(status))
      << "where ranks are says nothing of their cores";
  if (cores_ > 1) {
    EXPECT_EQ(allowed(run + "taskset -c 1 " + program), allowed("taskset -c 1 " + status)) << "bound by somebody else";
  }
}

TEST_F(Front, HugePagesComeLaterWhereFreeMemoryIsTheHosts) {
  const std::string lines = "\n" + testing_support::run_command((folder_ / "shardtune").string() + " train").output;
  EXPECT_NE(lines.find("glibc.malloc.hugetlb=1"), std::string::npos) << lines;
  const pid_t child = ::fork();  // what it postpones is its own
  if (child == 0) ::_exit(is_free_memory_returned() && postpone_huge_pages() ? 1 : 0);
  int status = 0;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  EXPECT_EQ(lines.find("\nSHARDTUNE_HUGE_PAGES_POSTPONED=1\n") != std::string::npos, WEXITSTATUS(status) == 1);
  const std::string chosen =
      "\n" + testing_support::run_command(
                 fmt::format("GLIBC_TUNABLES=glibc.malloc.hugetlb=0 {} train", (folder_ / "shardtune").string()))
                 .output;
  EXPECT_EQ(chosen.find("SHARDTUNE_HUGE_PAGES_POSTPONED"), std::string::npos) << "nobody wants them";
}

TEST_F(Front, AUsersOwnChoiceStays) {
  EXPECT_EQ(waiting("OMP_WAIT_POLICY=passive"), "sleep");
  EXPECT_NE(waiting("OMP_WAIT_POLICY=active").find("\nOMP_WAIT_POLICY=active\n"), std::string::npos);
  EXPECT_NE(waiting("GOMP_SPINCOUNT=77").find("\nGOMP_SPINCOUNT=77\n"), std::string::npos);
}

}  // namespace
}  // namespace shardtune
