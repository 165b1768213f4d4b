#pragma once
// Crash-safe sharded checkpoints in OUTPUT_DIR/checkpoint-<step>/. The protocol and the format are described in
// docs/checkpoint_format.md. Loading works at any number of ranks and under any plan.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "checkpoint/background_worker.hpp"
#include "checkpoint/snapshot.hpp"
#include "checkpoint/state_view.hpp"
#include "core/error.hpp"
#include "distributed/comm/communicator.hpp"

namespace shardtune {

class LocalStage;
struct ManifestFile;
struct ShardIdentity;

struct CheckpointInfo {
  std::int64_t step = 0;
  std::filesystem::path directory;
  bool is_committed = false;  // has a manifest that parses and whose own checksum holds
  std::string problem;        // why it is not usable, empty when it is
  bool is_unreadable = false;  // the system refused to read the manifest: nobody knows whether it is usable
};

// Which checkpoints a save leaves behind.
struct Retention {
  int keep = 0;                                    // the newest so many, 0 = all; the last good one always stays
  std::vector<std::int64_t> protected_steps = {};  // these stay as well (HF: the best one)
};

struct SaveReport {
  std::int64_t step = 0;
  std::uint64_t bytes = 0;   // of all shards
  double seconds = 0;        // from begin_save to the commit
  double write_seconds = 0;  // of rank 0, until its shard was durable (on the local disk, if there is one)
  double drain_seconds = 0;  // of rank 0, from the local disk to the output directory
  Snapshot::Cost cost;       // for this rank's training thread
};

class CheckpointStore {
 public:
  // `communicator` must outlive the store. Only rank 0 creates and renames directories and writes manifests. While a
  // save runs in the background at most `staging_bytes` hold copies of what training has changed since.
  // Each `ranks_per_file` consecutive ranks, which must run on one host, write one file together; 0 = chosen by
  // choose_ranks_per_file. With a `local_dir` (a disk of each node) saves go there first and are drained to the output
  // directory from there. Collective.
  CheckpointStore(std::filesystem::path output_dir, Communicator& communicator,
                  std::size_t staging_bytes = std::size_t{1} << 30, int ranks_per_file = 0,
                  const std::filesystem::path& local_dir = {});
  ~CheckpointStore();  // local; a save that is under way is given up
  // Local, the same on all ranks, between saves. Shards are compressed without loss before they are committed.
  void set_compression(bool is_on) { is_compressed_ = is_on; }

  // Collective. Writes checkpoint-<step>, returns when it is durable and committed. On any rank's failure every rank
  // throws the same Error (naming rank, file and reason); nothing is committed and older checkpoints are untouched.
  SaveReport save(std::int64_t step, const StateView& view, const Retention& retention = {});

  // The same in the background, by one writer thread per rank that never communicates. A save has stages (laying
  // out the files, writing, sealing them, draining them, then the commit on rank 0); a stage begins when every rank
  // knows that all have ended the one before:
  //   begin_save(...);                                     collective; no save may be under way
  //   while training:  preserve(t) before t is changed     local
  //                    any = max over ranks of is_working()
  //                    if (is_saving() && !any) report = advance_save();   collective
  //   finish_save() instead, to wait                       collective
  // advance_save() gives the report when the checkpoint is committed. It and the others throw as save() does; the save
  // is over then and its partial directory removed.
  void begin_save(std::int64_t step, StateView view, const Retention& retention);
  bool is_saving() const noexcept { return save_ != nullptr; }  // the same on all ranks
  bool is_working() const { return worker_.is_running(); }      // this rank's part of the stage, local
  // Of this rank's part of the save under way: bytes that the writer has taken, and all. Local.
  std::pair<std::uint64_t, std::uint64_t> progress() const;
  void preserve(const at::Tensor& about_to_change);
  std::optional<SaveReport> advance_save();
  SaveReport finish_save();

  // Collective. Fills view.slices[i].data (the caller chose names, offsets and sizes for ITS parallel layout) and
  // returns the run state. Every byte that is read is verified against the block tables on the way. Error{data} when
  // the checkpoint lacks a tensor, has another shape (checkpoint of another model) or fails verification.
  nlohmann::json load(const std::filesystem::path& checkpoint_dir, StateView& view);

  // Collective (rank 0 reads the directory and shares the result): newest first.
  std::vector<CheckpointInfo> list();
  // Collective. Newest checkpoint that verifies fully; those skipped are logged with the reason. Empty path = none.
  // Error{io} when there is none but some that could not be read.
  // Finishes the drain of a newer one first that the nodes' local disks hold whole; Error{io} when only that cannot be
  // written.
  std::filesystem::path newest_usable();
  // Collective, at resume: stale *.partial directories are removed, damaged and abandoned checkpoints (step > resumed
  // step) are renamed to *.rejected-<run id>, but not those that newest_usable() could not read; local disks are
  // cleared.
  void prepare_resume(std::int64_t resumed_step, const std::string& run_id);

 private:
  struct RunningSave;
  void start_layout();
  void start_writing();
  void start_sealing();
  void start_drain();
  void start_commit();
  void write_alone();
  bool owns_file() const { return communicator_.rank() % ranks_per_file_ == 0; }
  ShardIdentity shard_identity(std::int64_t step) const;
  std::string file_name() const;
  std::filesystem::path write_directory(std::int64_t step) const;
  void finish_interrupted_drain();
  bool drain_and_publish(std::int64_t step, const std::string& manifest_text,
                         const std::vector<std::pair<std::filesystem::path, ManifestFile>>& to_drain);
  void remove_partial(const Error& reason, std::int64_t step);

  std::filesystem::path output_dir_;
  Communicator& communicator_;
  std::size_t staging_bytes_;
  int ranks_per_file_;
  std::unique_ptr<Communicator> file_group_;  // the ranks of this rank's file; null when it is alone
  std::unique_ptr<LocalStage> local_;
  bool is_compressed_ = false;
  std::int64_t committed_step_ = -1;  // of the last save of this store
  std::set<std::int64_t> unreadable_;  // steps that newest_usable() has left out for what may pass; equal on all ranks
  std::unique_ptr<RunningSave> save_;
  BackgroundWorker worker_;  // last: its job uses the members above
};

// Names of the phases of save(), in order; the fault tests learn from a hook when each begins.
using SavePhaseHook = std::function<void(const char* phase, std::int64_t step)>;
void set_save_phase_hook(SavePhaseHook hook);

// --- offline, no communicator, constant memory -----------------------------------------------------------------
std::vector<CheckpointInfo> list_checkpoints(const std::filesystem::path& output_dir);
// A checkpoint's path as an absolute one without a slash at its end: its parent is the output directory.
std::filesystem::path absolute_checkpoint(const std::filesystem::path& checkpoint_dir);
// Every byte of every file against manifest and block tables. Returns problems (empty = good).
std::vector<std::string> verify_checkpoint(const std::filesystem::path& checkpoint_dir);
// The files of a model directory that lie beside the shards (configuration, tokenizer, trainer state) have the digests of
// the manifest. Error{data} naming the first that has not. A directory without manifest.json is no checkpoint and passes.
void check_side_files(const std::filesystem::path& checkpoint_dir);
nlohmann::json read_checkpoint_run_state(const std::filesystem::path& checkpoint_dir);  // verified manifest's run state

}  // namespace shardtune
