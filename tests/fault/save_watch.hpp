#pragma once
// What a training job is doing, seen from outside: by what its output directory shows of the commit protocol.
#include <sys/types.h>

#include <chrono>
#include <filesystem>
#include <string>
#include <vector>

namespace shardtune::testing_support {

// Steps of committed checkpoints (directories of that name), newest last.
std::vector<int> committed_steps(const std::filesystem::path& output_dir);

// The steps of a save that a directory shows, in their order (docs/checkpoint_format.md, "How a checkpoint is
// committed").
const std::vector<std::string>& protocol_steps();
// Those of a save through local disks that go before the fifth of them instead of the second to fourth.
const std::vector<std::string>& local_steps();

class SaveWatch {
 public:
  // Before a job is started there. `last_step` is where its run ends, `local_dir` its --checkpoint_local_dir.
  SaveWatch(std::filesystem::path output_dir, int last_step, std::filesystem::path local_dir = {});
  // Training has begun: what an earlier job left behind was swept away.
  bool has_begun() const;
  // One of protocol_steps() or local_steps(), or "starting or resuming", "training, no save under way", "ending".
  std::string phase() const;
  // Remembers what is committed now. From here on it must not be lost, whoever is killed.
  void note_committed();
  // The newest checkpoint that was there at the start or was noted is gone and no newer one is there. Says which; empty
  // = nothing was lost.
  std::string loss() const;

 private:
  const std::filesystem::path output_dir_;
  const int last_step_;
  const std::filesystem::path local_dir_;
  const int newest_before_;  // -1 = none
  int newest_noted_;
  const std::filesystem::file_time_type config_before_;  // of resolved.cfg, which is written when training begins
};

// SIGSTOP, and until the process stands still; a few ms at most.
void stop_process(pid_t process);
// Until none of these processes runs any more (zombies do not). False after `seconds`.
bool wait_for_end(const std::vector<pid_t>& processes, double seconds);

}  // namespace shardtune::testing_support
