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
void tidy_up(const std::filesystem::path& output_dir, std::int64_t step, int keep,
             const std::vector<std::int64_t>& protected_steps) {
  try {
    write_latest(output_dir, step);
    announce("latest_written", step);
    prune_checkpoints(output_dir, step, keep, protected_steps);
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

void CheckpointStore::save(std::int64_t step, const StateView& view, int keep,
                           const std::vector<std::int64_t>& protected_steps) {
  const bool is_root = communicator_.rank() == 0;
  const std::filesystem::path partial = partial_path(output_dir_, step);
  const std::string what = fmt::format("saving checkpoint-{}", step);
  std::vector<ManifestFile> side_files;
  try {
    run_agreed(communicator_, what, [&] {
      announce("begin", step);
      if (is_root) make_partial(output_dir_, partial);
    });
    std::string description;
    run_agreed(communicator_, what, [&] {
      wait_for_directory(partial);
      const ShardIdentity identity{step, communicator_.rank(), communicator_.size()};
      const auto phase = [&](const char* name) { announce(name, step); };
      description = describe(write_shard(partial, identity, view, phase), view);
      if (is_root) side_files = write_side_files(partial, view.side_files);
    });
    const std::vector<std::string> shards = gather_strings(communicator_, description, 0);
    run_agreed(communicator_, what, [&] {
      // Rank 0 alone can fail from here on: once it has renamed the directory the checkpoint exists.
      if (is_root) commit({output_dir_, step, view, side_files}, shards);
    });
  } catch (const Error& e) {
    // Every rank is out of the directory: each came here through the agreement. After a lost rank nothing is touched.
    std::error_code ignored;
    if (is_root && e.kind() != ErrorKind::comm) std::filesystem::remove_all(partial, ignored);
    throw;
  }
  if (is_root) tidy_up(output_dir_, step, keep, protected_steps);
}

}  // namespace shardtune
