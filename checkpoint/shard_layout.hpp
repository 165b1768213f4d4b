#pragma once
// Lays out one HDF5 file of a checkpoint: every dataset with its attributes and its place, but not its elements, which
// are written to these places by plain writes. HDF5 never sees the data, so it cannot convert, cache or lose them.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json.hpp>

#include "checkpoint/state_view.hpp"

namespace shardtune {

struct ShardIdentity {
  std::int64_t step = 0;
  int rank = 0;
  int num_ranks = 1;

  std::string file_name() const;  // shard-00000-of-00004.h5
};

// Data of at least this many bytes begin at a multiple of it in the file, as direct writes need.
inline constexpr std::uint64_t kDataAlignment = 4096;

// Writes FILE (replacing it), closed and complete but for the elements. Returns the byte position of every slice's
// first element; 0 for empty slices, which get no dataset. Thread-safe. Error{io} with the system's reason.
std::vector<std::uint64_t> lay_out_shard(const std::filesystem::path& file, const ShardIdentity& identity,
                                         const StateView& view);

}  // namespace shardtune
