#include <chrono>
#include <mutex>
#include <system_error>
#include <thread>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/agreement.hpp"
#include "checkpoint/checkpoint_commit.hpp"
#include "checkpoint/checkpoint_directory.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/shard_writer.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/log.hpp"

namespace shardtune {
namespace {

// Ranks may be threads, so the hook is shared under a lock; it is empty outside of tests.
std::mutex hook_mutex;
SavePhaseHook save_phase_hook;

void announce(const char* phase, std::int64_t step) {
  SavePhaseHook hook;
  {
    const std::lock_guard lock(hook_mutex);
    hook = save_phase_hook;
  }
  if (hook) hook(phase, step);
}

// Rank 0 has made the directory; a network file system may show it to other nodes a little later.
void wait_for_directory(const std::filesystem::path& directory) {
  using namespace std::chrono_literals;
  std::error_code ignored;
  for (int i = 0; i < 200 && !std::filesystem::is_directory(directory, ignored); ++i) std::this_thread::sleep_for(50ms);
}

// The checkpoint is committed by now: what fails here costs disk space or a hint, not the run.
void tidy_up(const std::filesystem::path& output_dir, std::int64_t step, const Retention& retention) {
  try {
    write_latest(output_dir, step);
    announce("latest_written", step);
    prune_checkpoints(output_dir, step, retention.keep, retention.protected_steps);
    announce("pruned", step);
  } catch (const Error& e) {
    log::warn("checkpoint-{} is safe, but tidying up after it failed: {}", step, e.what());
  }
}

}  // namespace

void set_save_phase_hook(SavePhaseHook hook) {
  const std::lock_guard lock(hook_mutex);
  save_phase_hook = std::move(hook);
}

// One save from begin_save to its report. The worker uses it while a stage runs, the training thread in between.
struct CheckpointStore::RunningSave {
  RunningSave(std::int64_t save_step, StateView view, Retention kept, std::size_t staging_bytes)
      : step(save_step), retention(std::move(kept)), snapshot(std::move(view), staging_bytes) {}

  std::string what() const { return fmt::format("saving checkpoint-{}", step); }

  const std::int64_t step;
  const Retention retention;
  Snapshot snapshot;
  const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  bool is_committing = false;  // the second stage
  std::string description;     // of this rank's shard
  std::vector<ManifestFile> side_files;
  std::vector<std::string> shards;  // all descriptions, on rank 0
  SaveReport report;
};

CheckpointStore::CheckpointStore(std::filesystem::path output_dir, Communicator& communicator,
                                 std::size_t staging_bytes)
    : output_dir_(std::move(output_dir)), communicator_(communicator), staging_bytes_(staging_bytes) {}

CheckpointStore::~CheckpointStore() {
  if (!save_) return;
  save_->snapshot.cancel();
  worker_.wait();
}

void CheckpointStore::begin_save(std::int64_t step, StateView view, const Retention& retention) {
  check_internal(!save_, "CheckpointStore::begin_save: a save is under way");
  auto save = std::make_unique<RunningSave>(step, std::move(view), retention, staging_bytes_);
  try {
    run_agreed(communicator_, save->what(), [&] {
      announce("begin", step);
      if (communicator_.rank() == 0) make_partial(output_dir_, partial_path(output_dir_, step));
    });
  } catch (const Error& e) {
    remove_partial(e, step);
    throw;
  }
  save_ = std::move(save);
  worker_.start([this] { save_->description = write_this_shard(*save_); });
}

// Every rank is out of the directory: each came here through an agreement. After a lost rank nothing is touched.
void CheckpointStore::remove_partial(const Error& reason, std::int64_t step) {
  std::error_code ignored;
  if (communicator_.rank() == 0 && reason.kind() != ErrorKind::comm)
    std::filesystem::remove_all(partial_path(output_dir_, step), ignored);
}

void CheckpointStore::preserve(const at::Tensor& about_to_change) {
  if (save_) save_->snapshot.preserve(about_to_change);
}

// On the worker.
std::string CheckpointStore::write_this_shard(RunningSave& save) {
  const std::filesystem::path partial = partial_path(output_dir_, save.step);
  try {
    wait_for_directory(partial);
    const ShardIdentity identity{save.step, communicator_.rank(), communicator_.size()};
    const auto phase = [&](const char* name) { announce(name, save.step); };
    const WrittenShard shard = write_shard(partial, identity, save.snapshot, phase);
    save.report.write_seconds = shard.write_seconds;
    if (communicator_.rank() == 0) save.side_files = write_side_files(partial, save.snapshot.view().side_files);
    return describe_shard(shard, save.snapshot.view());
  } catch (...) {
    save.snapshot.abandon();
    throw;
  }
}

std::optional<SaveReport> CheckpointStore::advance_stage(RunningSave& save) {
  const bool is_root = communicator_.rank() == 0;
  // Rank 0 alone can fail in the second stage: once it has renamed the directory the checkpoint exists.
  run_agreed(communicator_, save.what(), [&] { worker_.collect(); });
  if (!save.is_committing) {
    save.is_committing = true;
    save.shards = gather_strings(communicator_, save.description, 0);
    if (is_root)
      worker_.start([this, &save] {
        commit_checkpoint({output_dir_, save.step, save.snapshot.view().run, save.side_files, save.shards},
                          [&](const char* name) { announce(name, save.step); });
        tidy_up(output_dir_, save.step, save.retention);
      });
    return std::nullopt;
  }
  save.report.step = save.step;
  for (const std::string& shard : save.shards)
    save.report.bytes += nlohmann::json::parse(shard)["size"].get<std::uint64_t>();
  save.report.seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - save.start).count();
  save.report.cost = save.snapshot.cost();
  return save.report;
}

std::optional<SaveReport> CheckpointStore::advance_save() {
  check_internal(save_ != nullptr, "CheckpointStore::advance_save: no save is under way");
  try {
    const std::optional<SaveReport> report = advance_stage(*save_);
    if (report) save_.reset();
    return report;
  } catch (const Error& e) {
    save_->snapshot.cancel();
    worker_.wait();
    remove_partial(e, save_->step);
    save_.reset();
    throw;
  }
}

SaveReport CheckpointStore::finish_save() {
  while (true) {
    worker_.wait();
    if (const auto report = advance_save()) return *report;
  }
}

SaveReport CheckpointStore::save(std::int64_t step, const StateView& view, const Retention& retention) {
  begin_save(step, view, retention);
  return finish_save();
}

}  // namespace shardtune
