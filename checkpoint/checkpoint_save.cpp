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
#include "checkpoint/local_stage.hpp"
#include "checkpoint/shard_writer.hpp"
#include "checkpoint/shared_shard.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/log.hpp"
#include "distributed/comm/exchange.hpp"

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

double seconds_since(std::chrono::steady_clock::time_point start) {
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
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
  enum class Stage { layout, writing, sealing, draining, commit };

  RunningSave(std::int64_t save_step, StateView view, Retention kept, std::size_t staging_bytes)
      : step(save_step), retention(std::move(kept)), snapshot(std::move(view), staging_bytes) {}

  std::string what() const { return fmt::format("saving checkpoint-{}", step); }
  Commit commit(const std::filesystem::path& output_dir, int num_ranks) const {
    return {output_dir, step, snapshot.view().run, side_files, shards, num_ranks};
  }

  const std::int64_t step;
  const Retention retention;
  Snapshot snapshot;
  const std::chrono::steady_clock::time_point start = std::chrono::steady_clock::now();
  Stage stage = Stage::layout;
  std::optional<ShardWriter> writer;
  StateView whole;                       // of the file; on its owner
  std::size_t first_slice = 0;           // this rank's in `whole`
  std::vector<std::uint64_t> positions;  // of `whole` on the owner, then of this rank's slices
  std::vector<WrittenPart> parts;        // this rank's, then on the owner those of all
  std::string description;               // of the file, on its owner
  std::vector<ManifestFile> side_files;
  std::vector<std::string> shards;  // all descriptions, on rank 0
  std::string manifest_text;        // with a local disk
  SaveReport report;
};

CheckpointStore::CheckpointStore(std::filesystem::path output_dir, Communicator& communicator,
                                 std::size_t staging_bytes, int ranks_per_file, const std::filesystem::path& local_dir)
    : output_dir_(std::move(output_dir)),
      communicator_(communicator),
      staging_bytes_(staging_bytes),
      ranks_per_file_(agree_ranks_per_file(communicator, ranks_per_file)),
      file_group_(split_by_file(communicator, ranks_per_file_)) {
  if (local_dir.empty()) return;
  run_agreed(communicator, "preparing the local disk",
             [&] { local_ = std::make_unique<LocalStage>(local_dir, output_dir_); });
}

CheckpointStore::~CheckpointStore() {
  if (save_) {
    save_->snapshot.cancel();
    worker_.wait();
  } else if (local_ && committed_step_ >= 0 && owns_file()) {
    local_->remove(file_name(), committed_step_);  // it was drained
  }
}

ShardIdentity CheckpointStore::shard_identity(std::int64_t step) const {
  return {step, communicator_.rank() / ranks_per_file_, (communicator_.size() + ranks_per_file_ - 1) / ranks_per_file_};
}

std::string CheckpointStore::file_name() const { return shard_identity(0).file_name(); }

std::filesystem::path CheckpointStore::write_directory(std::int64_t step) const {
  return local_ ? local_->partial(file_name(), step) : partial_path(output_dir_, step);
}

void CheckpointStore::begin_save(std::int64_t step, StateView view, const Retention& retention) {
  check_internal(!save_, "CheckpointStore::begin_save: a save is under way");
  auto save = std::make_unique<RunningSave>(step, std::move(view), retention, staging_bytes_);
  const std::filesystem::path partial = partial_path(output_dir_, step);
  try {
    run_agreed(communicator_, save->what(), [&] {
      announce("begin", step);
      if (communicator_.rank() == 0) make_partial(output_dir_, partial);
      if (local_ && owns_file()) local_->begin(file_name(), step, committed_step_);
    });
  } catch (const Error& e) {
    remove_partial(e, step);
    throw;
  }
  const auto phase = [step, &snapshot = save->snapshot](const char* name) {
    snapshot.check_not_cancelled();  // a rank that fails must not wait until gigabytes are read back
    announce(name, step);
  };
  save->writer.emplace(write_directory(step), shard_identity(step), phase, is_compressed_);
  save_ = std::move(save);
  if (!file_group_) {
    save_->stage = RunningSave::Stage::sealing;  // without others the first three stages are one
    worker_.start([this] { write_alone(); });
  } else {
    start_layout();
    worker_.wait();
    advance_save();  // to the writing: from here on the writers progress without the training threads
  }
}

// Every rank is out of the directory: each came here through an agreement. After a lost rank nothing is touched.
void CheckpointStore::remove_partial(const Error& reason, std::int64_t step) {
  std::error_code ignored;
  if (communicator_.rank() == 0 && reason.kind() != ErrorKind::comm)
    std::filesystem::remove_all(partial_path(output_dir_, step), ignored);
}

std::pair<std::uint64_t, std::uint64_t> CheckpointStore::progress() const {
  check_internal(save_ != nullptr, "CheckpointStore::progress: no save is under way");
  return {save_->snapshot.taken_bytes(), save_->snapshot.total_bytes()};
}

void CheckpointStore::preserve(const at::Tensor& about_to_change) {
  if (save_) save_->snapshot.preserve(about_to_change);
}

// On the worker.
void CheckpointStore::write_alone() {
  RunningSave& save = *save_;
  try {
    const std::filesystem::path directory = write_directory(save.step);
    wait_for_directory(directory);
    const auto start = std::chrono::steady_clock::now();
    const std::vector<std::uint64_t> positions = save.writer->lay_out(save.snapshot.view());
    std::vector<WrittenPart> parts = save.writer->write(save.snapshot, positions);
    save.report.write_seconds = seconds_since(start);
    save.description = describe_shard(save.writer->seal(std::move(parts)), save.snapshot.view());
    if (communicator_.rank() == 0) save.side_files = write_side_files(directory, save.snapshot.view().side_files);
  } catch (...) {
    save.snapshot.abandon();
    throw;
  }
}

void CheckpointStore::start_layout() {
  RunningSave& save = *save_;
  const std::vector<std::string> descriptions = all_gather_strings(*file_group_, describe_slices(save.snapshot.view()));
  save.whole = join_slices(descriptions, save.snapshot.view().run);
  for (int rank = 0; rank < file_group_->rank(); ++rank)
    save.first_slice += join_slices({descriptions[static_cast<std::size_t>(rank)]}, nullptr).slices.size();
  if (file_group_->rank() == 0)
    worker_.start([this, &save] {
      wait_for_directory(write_directory(save.step));
      save.positions = save.writer->lay_out(save.whole);
    });
}

void CheckpointStore::start_writing() {
  RunningSave& save = *save_;
  const std::vector<std::uint64_t> all =
      unpack_positions(broadcast_string(*file_group_, pack_positions(save.positions), 0));
  const auto first = all.begin() + static_cast<std::ptrdiff_t>(save.first_slice);
  save.positions.assign(first, first + static_cast<std::ptrdiff_t>(save.snapshot.view().slices.size()));
  worker_.start([this, &save] {
    const auto start = std::chrono::steady_clock::now();
    wait_for_directory(write_directory(save.step));
    save.parts = save.writer->write(save.snapshot, save.positions);
    save.report.write_seconds = seconds_since(start);
    if (communicator_.rank() == 0)
      save.side_files = write_side_files(write_directory(save.step), save.snapshot.view().side_files);
  });
}

void CheckpointStore::start_sealing() {
  RunningSave& save = *save_;
  const std::vector<std::string> others = gather_strings(*file_group_, pack_parts(save.parts), 0);
  if (file_group_->rank() != 0) return;
  save.parts.clear();
  for (const std::string& parts : others) unpack_parts(parts, save.parts);
  worker_.start([&save] { save.description = describe_shard(save.writer->seal(std::move(save.parts)), save.whole); });
}

// The manifest goes to every node, where it says that the node's part is whole; then the parts go to the output
// directory.
void CheckpointStore::start_drain() {
  RunningSave& save = *save_;
  save.shards = gather_strings(communicator_, save.description, 0);
  if (communicator_.rank() == 0) save.manifest_text = make_manifest(save.commit(output_dir_, communicator_.size()));
  save.manifest_text = broadcast_string(communicator_, save.manifest_text, 0);
  if (!owns_file()) return;
  worker_.start([this, &save] {
    local_->complete(file_name(), save.step, save.manifest_text);
    announce("local_complete", save.step);
    const auto start = std::chrono::steady_clock::now();
    const std::filesystem::path from = local_->complete_path(file_name(), save.step),
                                to = partial_path(output_dir_, save.step);
    wait_for_directory(to);
    const auto keep_going = [&save] { save.snapshot.check_not_cancelled(); };
    for (const ManifestFile& file : parse_manifest(save.manifest_text, from).files)
      if (file.name.starts_with(file_name()) || (communicator_.rank() == 0 && !file.has_block_table))
        drain_file(from, file, to, keep_going);
    save.report.drain_seconds = seconds_since(start);
    announce("drained", save.step);
  });
}

void CheckpointStore::start_commit() {
  RunningSave& save = *save_;
  if (!local_) save.shards = gather_strings(communicator_, save.description, 0);
  if (communicator_.rank() != 0) return;
  worker_.start([this, &save] {
    const auto phase = [&](const char* name) { announce(name, save.step); };
    if (local_) {
      phase("agreed");
      publish_manifest(output_dir_, save.step, save.manifest_text, phase);
    } else {
      commit_checkpoint(save.commit(output_dir_, communicator_.size()), phase);
    }
    tidy_up(output_dir_, save.step, save.retention);
  });
}

std::optional<SaveReport> CheckpointStore::advance_save() {
  check_internal(save_ != nullptr, "CheckpointStore::advance_save: no save is under way");
  using Stage = RunningSave::Stage;
  RunningSave& save = *save_;
  try {
    run_agreed(communicator_, save.what(), [&] { worker_.collect(); });
    switch (save.stage) {
      case Stage::layout: start_writing(), save.stage = Stage::writing; return std::nullopt;
      case Stage::writing: start_sealing(), save.stage = Stage::sealing; return std::nullopt;
      case Stage::sealing:
        if (local_) {
          start_drain(), save.stage = Stage::draining;
          return std::nullopt;
        }
        [[fallthrough]];
      case Stage::draining: start_commit(), save.stage = Stage::commit; return std::nullopt;
      case Stage::commit: break;
    }
  } catch (const Error& e) {
    save.snapshot.cancel();
    worker_.wait();
    remove_partial(e, save.step);
    save_.reset();
    throw;
  }
  committed_step_ = save.step;
  SaveReport report = save.report;
  report.step = save.step;
  for (const std::string& shard : save.shards)
    if (!shard.empty()) report.bytes += nlohmann::json::parse(shard)["size"].get<std::uint64_t>();
  report.seconds = seconds_since(save.start);
  report.cost = save.snapshot.cost();
  save_.reset();
  return report;
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
