#include "checkpoint/checkpoint_commit.hpp"

#include <map>
#include <system_error>

#include <fmt/format.h>

#include "checkpoint/block_table.hpp"
#include "checkpoint/checkpoint_directory.hpp"
#include "core/error.hpp"
#include "core/file.hpp"

namespace shardtune {
namespace {

// The manifest makes the files a checkpoint.
class ManifestBuilder {
 public:
  void add_shard(const nlohmann::json& shard) {
    const std::size_t file = manifest_.files.size();
    manifest_.files.push_back({shard.at("file"), shard.at("size"), shard.at("digest"), true, shard.at("raw_size")});
    for (const auto& slice : shard.at("slices"))
      tensor(slice).slices.push_back({file, slice.at(4), slice.at(5), slice.at(6)});
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
    auto [it, is_new] =
        tensors_.try_emplace(key, ManifestTensor{key.first, key.second, shape, {}, slice.at(3).get<std::string>()});
    if (it->second.shape != shape || it->second.dtype != slice.at(3).get<std::string>())
      fail(ErrorKind::internal, fmt::format("ranks disagree about the shape or type of '{}'", key.first));
    return it->second;
  }

  Manifest manifest_;
  std::map<std::pair<std::string, std::string>, ManifestTensor> tensors_;
};

}  // namespace

void make_partial(const std::filesystem::path& output_dir, const std::filesystem::path& partial) {
  make_directories_durably(output_dir);
  std::error_code error;
  std::filesystem::remove_all(partial, error);
  if (!error) std::filesystem::create_directory(partial, error);
  if (error) fail_writing("create", partial, error.value());
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

std::string describe_shard(const WrittenShard& shard, const StateView& view) {
  nlohmann::json slices = nlohmann::json::array(), empty = nlohmann::json::array();
  for (std::size_t i = 0; i < view.slices.size(); ++i) {
    const StateSlice& slice = view.slices[i];
    if (slice.data.numel() == 0)
      empty.push_back({slice.name, slice.field, slice.global_shape, dtype_name(slice.data.scalar_type())});
    else
      slices.push_back({slice.name, slice.field, slice.global_shape, dtype_name(slice.data.scalar_type()),
                        shard.positions[i], slice.offset, slice.data.numel()});
  }
  return nlohmann::json{{"file", shard.file},         {"size", shard.size}, {"digest", shard.digest},
                        {"raw_size", shard.raw_size}, {"slices", slices},   {"empty", empty}}
      .dump();
}

std::string make_manifest(const Commit& what) {
  ManifestBuilder builder;
  for (const std::string& shard : what.shards)
    if (!shard.empty()) builder.add_shard(nlohmann::json::parse(shard));
  Manifest manifest = builder.finish();
  manifest.step = what.step;
  manifest.num_ranks = what.num_ranks;
  manifest.run = what.run;
  manifest.files.insert(manifest.files.end(), what.side_files.begin(), what.side_files.end());
  return serialize_manifest(manifest);
}

std::string run_id_of(const nlohmann::json& run) {
  return run.is_object() && run.contains("run_id") && run["run_id"].is_string() ? run["run_id"].get<std::string>() : "";
}

void publish_manifest(const std::filesystem::path& output_dir, std::int64_t step, const std::string& manifest_text,
                      const PhaseHook& phase) {
  const std::filesystem::path partial = partial_path(output_dir, step);
  write_file_durably(partial / "manifest.json", manifest_text);
  const Manifest manifest = read_manifest(partial);
  phase("manifest_written");
  publish_checkpoint(partial, checkpoint_path(output_dir, step), run_id_of(manifest.run));
  phase("directory_renamed");
}

void commit_checkpoint(const Commit& what, const PhaseHook& phase) {
  phase("agreed");
  publish_manifest(what.output_dir, what.step, make_manifest(what), phase);
}

}  // namespace shardtune
