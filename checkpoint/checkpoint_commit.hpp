#pragma once
// From written shards to a committed checkpoint. For the one process that commits: rank 0, or an offline tool.
// Error{io} on failure; the caller removes the partial directory then.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include "checkpoint/manifest.hpp"
#include "checkpoint/shard_writer.hpp"
#include "checkpoint/state_view.hpp"

namespace shardtune {

// An empty OUTPUT_DIR/checkpoint-<step>.partial.
void make_partial(const std::filesystem::path& output_dir, const std::filesystem::path& partial);

std::vector<ManifestFile> write_side_files(const std::filesystem::path& directory,
                                           const std::vector<SideFile>& side_files);

// What the committing process must know of a shard, as JSON text: it travels by messages, nobody looks at files.
std::string describe_shard(const WrittenShard& shard, const StateView& view);

struct Commit {
  std::filesystem::path output_dir;
  std::int64_t step = 0;
  const nlohmann::json& run;  // its "run_id", if any, names what the commit moves aside
  const std::vector<ManifestFile>& side_files;
  const std::vector<std::string>&
      shards;         // describe_shard of each, in the order of their files; empty texts are skipped
  int num_ranks = 1;  // that wrote them
};

std::string run_id_of(const nlohmann::json& run);  // empty where it has none

// The text of the manifest that makes these files a checkpoint.
std::string make_manifest(const Commit& what);
// Writes the manifest into the partial directory of `step`, which holds its files, and publishes it, durably. `phase` as in
// ShardWriter.
void publish_manifest(const std::filesystem::path& output_dir, std::int64_t step, const std::string& manifest_text,
                      const PhaseHook& phase);
// Both.
void commit_checkpoint(const Commit& what, const PhaseHook& phase);

}  // namespace shardtune
