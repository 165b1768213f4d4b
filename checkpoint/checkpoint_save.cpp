#include <chrono>
#include <map>
#include <mutex>
#include <system_error>
#include <thread>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/agreement.hpp"
#include "checkpoint/block_table.hpp"
#include "checkpoint/checkpoint_directory.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/manifest.hpp"
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

void make_partial(const std::filesystem::path& output_dir, const std::filesystem::path& partial) {
  std::error_code error;
  const bool is_new = std::filesystem::create_directories(output_dir, error);
  if (is_new && output_dir.has_parent_path()) fsync_path(output_dir.parent_path());
  if (!error) std::filesystem::remove_all(partial, error);
  if (!error) std::filesystem::create_directory(partial, error);
  if (error) fail(ErrorKind::io, fmt::format("cannot create {}: {}", partial.string(), error.message()));
}

std::vector<ManifestFile> write_side_files(const std::filesystem::path& directory,
                                           const std::vector<SideFile>& side_files) {
  std::vector<ManifestFile> written;
  for (const SideFile& side : side_files) {
    check_internal(!side.name.empty() && side.name[0] != '.' && side.name.find('/') == std::string::npos &&
                       side.name != "manifest.json",
                   "a side file needs a plain name");
    write_file_durably(directory / side.name, side.content);
    const BlockTable table = hash_file(directory / side.name);
    if (table.file_bytes != side.content.size())
      fail(ErrorKind::io, fmt::format("{} is shorter than what was written to it", (directory / side.name).string()));
    written.push_back({side.name, table.file_bytes, table.digest(), false});
  }
  return written;
}

// What rank 0 must know of a shard, by messages and not by looking at the files.
std::string describe(const WrittenShard& shard, const StateView& view) {
  nlohmann::json slices = nlohmann::json::array();
  for (const WrittenSlice& item : shard.slices) {
    const StateSlice& slice = view.slices[item.slice];
    slices.push_back({slice.name, slice.field, slice.global_shape, item.byte_offset, slice.offset, slice.data.numel()});
  }
  nlohmann::json empty = nlohmann::json::array();
  for (const StateSlice& slice : view.slices)
    if (slice.data.numel() == 0) empty.push_back({slice.name, slice.field, slice.global_shape});
  return nlohmann::json{
      {"file", shard.file}, {"size", shard.size}, {"digest", shard.digest}, {"slices", slices}, {"empty", empty}}
      .dump();
}

class ManifestBuilder {
 public:
  void add_shard(const nlohmann::json& shard) {
    const std::size_t file = manifest_.files.size();
    manifest_.files.push_back({shard.at("file"), shard.at("size"), shard.at("digest"), true});
    for (const auto& slice : shard.at("slices"))
      tensor(slice).slices.push_back({file, slice.at(3), slice.at(4), slice.at(5)});
    for (const auto& slice : shard.at("empty")) tensor(slice);
  }
  Manifest finish() {
    for (auto& [key, tensor] : tensors_) manifest_.tensors.push_back(std::move(tensor));
    normalize_tensors(manifest_.tensors);
    return std::move(manifest_);
  }

 private:
  ManifestTensor& tensor(const nlohmann::json& slice) {
    const auto key = std::pair(slice.at(0).get<std::string>(), slice.at(1).get<std::string>());
    const auto shape = slice.at(2).get<std::vector<std::int64_t>>();
    auto [it, is_new] = tensors_.try_emplace(key, ManifestTensor{key.first, key.second, shape, {}});
    if (it->second.shape != shape)
      fail(ErrorKind::internal, fmt::format("ranks disagree about the shape of '{}'", key.first));
    return it->second;
  }

  Manifest manifest_;
  std::map<std::pair<std::string, std::string>, ManifestTensor> tensors_;
};

struct Commit {
  std::filesystem::path output_dir;
  std::int64_t step;
  const StateView& view;
  const std::vector<ManifestFile>& side_files;
};

// On rank 0: the manifest makes the files a checkpoint, the rename of the directory publishes it.
void commit(const Commit& what, const std::vector<std::string>& shards) {
  announce("agreed", what.step);
  ManifestBuilder builder;
  for (const std::string& shard : shards) builder.add_shard(nlohmann::json::parse(shard));
  Manifest manifest = builder.finish();
  manifest.step = what.step;
  manifest.num_ranks = static_cast<int>(shards.size());
  manifest.run = what.view.run;
  manifest.files.insert(manifest.files.end(), what.side_files.begin(), what.side_files.end());
  const std::filesystem::path partial = partial_path(what.output_dir, what.step);
  write_file_durably(partial / "manifest.json", serialize_manifest(manifest));
  read_manifest(partial);
  announce("manifest_written", what.step);
  std::string run_id = "unknown";
  if (what.view.run.is_object() && what.view.run.contains("run_id") && what.view.run["run_id"].is_string())
    run_id = what.view.run["run_id"].get<std::string>();
  publish_checkpoint(partial, checkpoint_path(what.output_dir, what.step), run_id);
  announce("directory_renamed", what.step);
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
    return describe(shard, save.snapshot.view());
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
        commit({output_dir_, save.step, save.snapshot.view(), save.side_files}, save.shards);
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
