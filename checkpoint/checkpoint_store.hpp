#pragma once
// Crash-safe sharded checkpoints in OUTPUT_DIR/checkpoint-<step>/. The protocol and the format are described in
// docs/checkpoint_format.md. Loading works at any number of ranks and under any plan.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/state_view.hpp"
#include "distributed/comm/communicator.hpp"

namespace shardtune {

struct CheckpointInfo {
  std::int64_t step = 0;
  std::filesystem::path directory;
  bool is_committed = false;  // has a manifest that parses and whose own checksum holds
  std::string problem;        // why it is not usable, empty when it is
};

class CheckpointStore {
 public:
  // `communicator` must outlive the store. Only rank 0 creates and renames directories and writes manifests.
  CheckpointStore(std::filesystem::path output_dir, Communicator& communicator);

  // Collective. Writes checkpoint-<step>, returns when it is durable and committed. On any rank's failure every rank
  // throws the same Error{io} (naming rank, file and reason); nothing is committed and older checkpoints are untouched.
  // `run_identity` is recorded. Keeps the newest `keep` checkpoints (0 = all), never deleting the last good one nor
  // those in `protected_steps` (HF: the best one).
  void save(std::int64_t step, const StateView& view, int keep, const std::vector<std::int64_t>& protected_steps = {});

  // Collective. Fills view.slices[i].data (the caller chose names, offsets and sizes for ITS parallel layout) and
  // returns the run state. Every byte that is read is verified against the block tables on the way. Error{data} when
  // the checkpoint lacks a tensor, has another shape (checkpoint of another model) or fails verification.
  nlohmann::json load(const std::filesystem::path& checkpoint_dir, StateView& view);

  // Collective (rank 0 reads the directory and shares the result): newest first.
  std::vector<CheckpointInfo> list();
  // Collective. Newest checkpoint that verifies fully; those skipped are logged with the reason. Empty path = none.
  std::filesystem::path newest_usable();
  // Collective, at resume: stale *.partial directories are removed, rejected and abandoned checkpoints (step > resumed
  // step) are renamed to *.rejected-<run id>.
  void prepare_resume(std::int64_t resumed_step, const std::string& run_id);

 private:
  std::filesystem::path output_dir_;
  Communicator& communicator_;
};

// Names of the phases of save(), in order; the fault tests learn from a hook when each begins.
using SavePhaseHook = std::function<void(const char* phase, std::int64_t step)>;
void set_save_phase_hook(SavePhaseHook hook);

// --- offline, no communicator, constant memory -----------------------------------------------------------------
std::vector<CheckpointInfo> list_checkpoints(const std::filesystem::path& output_dir);
// Every byte of every file against manifest and block tables. Returns problems (empty = good).
std::vector<std::string> verify_checkpoint(const std::filesystem::path& checkpoint_dir);
nlohmann::json read_checkpoint_run_state(const std::filesystem::path& checkpoint_dir);  // verified manifest's run state

}  // namespace shardtune
