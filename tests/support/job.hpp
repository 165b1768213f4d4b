#pragma once
// A command running in the background, for tests that disturb it.
#include <sys/types.h>

#include <filesystem>
#include <optional>
#include <string>
#include <vector>

namespace shardtune::testing_support {

// In a process group of its own; whatever still runs is killed by the destructor. Not thread-safe.
class Job {
 public:
  // stdout and stderr go to `log`. The shell replaces itself when the command starts with "exec".
  Job(const std::string& command, const std::filesystem::path& log);
  ~Job();
  Job(const Job&) = delete;
  Job& operator=(const Job&) = delete;

  // The exit code (128 + signal when killed) once the command has ended; waits at most `seconds`.
  std::optional<int> wait(double seconds);
  bool is_running() { return !wait(0).has_value(); }
  pid_t pid() const noexcept { return pid_; }
  // Direct children whose program is called `program` (the ranks, for mpirun).
  std::vector<pid_t> children(const std::string& program) const;
  // Kills the command and every other descendant of this process, wherever they have moved to, and reaps them all. False
  // when one cannot be killed. Needs adopt_orphans().
  bool kill_all();

 private:
  pid_t pid_ = -1;
  std::optional<int> exit_code_;
};

// From now on a process below this one whose parent dies becomes a child of this one instead of leaving its sight.
void adopt_orphans();
// All processes below `process`, zombies included; parents come before their children.
std::vector<pid_t> descendants(pid_t process);
// Reaps the adopted children that have ended. No Job may be running.
void reap_orphans();

}  // namespace shardtune::testing_support
