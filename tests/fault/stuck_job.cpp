#include "tests/fault/stuck_job.hpp"

#include <fstream>
#include <sstream>
#include <system_error>

#include <fmt/format.h>

#include "tests/support/tiny_run.hpp"

namespace shardtune::testing_support {
namespace fs = std::filesystem;
namespace {

// Empty for what is gone or may not be read.
std::string content_of(const fs::path& file) {
  std::ostringstream text;
  text << std::ifstream(file).rdbuf();
  return text.str();
}

void describe_process(const fs::path& into, pid_t process) {
  std::ofstream out(into / fmt::format("process-{}.txt", process));
  std::error_code error;
  for (auto task = fs::directory_iterator(fmt::format("/proc/{}/task", process), error);
       !error && task != fs::directory_iterator(); task.increment(error))
    for (const char* name : {"status", "wchan", "syscall", "stack"})
      out << fmt::format("== task {} {}\n{}\n", task->path().filename().string(), name,
                         content_of(task->path() / name));
}

}  // namespace

void keep_evidence(const fs::path& into, const std::vector<pid_t>& processes, const std::string& story,
                   const fs::path& log) {
  fs::create_directories(into);
  std::ofstream(into / "story.txt") << story;
  std::error_code ignored;
  fs::copy_file(log, into / "job.log", ignored);
  run_command(fmt::format("ps -eLo pid,ppid,pgid,sid,lwp,stat,wchan:32,etimes,args > {}/ps.txt", into.string()));
  for (const pid_t process : processes) describe_process(into, process);
  if (run_command("command -v gdb").exit_code != 0) return;
  for (const pid_t process : processes)
    run_command(fmt::format("timeout 20 gdb -p {0} -batch -ex 'thread apply all bt' < /dev/null > {1}/gdb-{0}.txt 2>&1",
                            process, into.string()));
}

}  // namespace shardtune::testing_support
