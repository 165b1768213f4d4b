#pragma once
// manifest.json: what a committed checkpoint consists of. Format: docs/checkpoint_format.md.
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json.hpp>

namespace shardtune {

// The newest that is read. Written is the lowest that has what a checkpoint needs: 2 with bf16 tensors
// or compressed shards, else 1.
inline constexpr std::int64_t kCheckpointFormatVersion = 2;

struct ManifestFile {
  std::string name;  // plain name inside the checkpoint directory
  std::uint64_t size = 0;
  std::uint64_t digest = 0;      // BlockTable::digest() of the whole file
  bool has_block_table = false;  // NAME.xxh3 lies beside it (shards)
  std::uint64_t raw_size = 0;    // of the shard before compression (compressed_file.hpp); 0 = it is not compressed

  std::uint64_t data_size() const { return raw_size > 0 ? raw_size : size; }  // what slices count in
};

// Elements [offset, offset + numel) of the flat tensor, stored little-endian at byte_offset of files[file]
// (before its compression).
struct ManifestSlice {
  std::size_t file = 0;
  std::uint64_t byte_offset = 0;
  std::int64_t offset = 0;
  std::int64_t numel = 0;
};

struct ManifestTensor {
  std::string name;
  std::string field;
  std::vector<std::int64_t> shape;
  std::vector<ManifestSlice> slices;  // ascending, gapless, without overlap from 0 to numel(); empty slices left out
  std::string dtype = "float32";      // or "bfloat16"

  std::int64_t numel() const;
  std::uint64_t element_bytes() const { return dtype == "bfloat16" ? 2 : 4; }
};

struct Manifest {
  std::int64_t version = kCheckpointFormatVersion;  // of the format it was read from
  std::int64_t step = 0;
  int num_ranks = 0;   // that wrote it; of no meaning for reading
  nlohmann::json run;  // StateView::run
  std::vector<ManifestFile> files;
  std::vector<ManifestTensor> tensors;  // ascending by (name, field)

  const ManifestTensor* find(const std::string& name, const std::string& field) const;
};

// The JSON text with its checksum over all bytes before it.
std::string serialize_manifest(const Manifest& manifest);
// Error{data} naming `origin` for a damaged, malformed, inconsistent or newer manifest. Whatever the bytes are, a
// manifest that is returned describes slices inside its files that cover every tensor exactly once.
Manifest parse_manifest(std::string_view text, const std::filesystem::path& origin);
Manifest read_manifest(const std::filesystem::path& checkpoint_dir);

// Sorts slices and tensors; Error{internal} unless the slices of every tensor cover it exactly once.
void normalize_tensors(std::vector<ManifestTensor>& tensors);

}  // namespace shardtune
