#pragma once
// Writes one rank's slices as a serial HDF5 file with its block table, durably. HDF5 itself never syncs and leaves a
// readable-looking file after a failed write; so every return code counts, any failure discards the shard, and the
// finished file is read back and compared with memory before it counts as written.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/state_view.hpp"

namespace shardtune {

struct ShardIdentity {
  std::int64_t step = 0;
  int rank = 0;
  int num_ranks = 1;

  std::string file_name() const;  // shard-00000-of-00004.h5
};

struct WrittenSlice {
  std::size_t slice = 0;          // index in the StateView
  std::uint64_t byte_offset = 0;  // of its first element in the file
};

struct WrittenShard {
  std::string file;
  std::uint64_t size = 0;
  std::uint64_t digest = 0;
  std::vector<WrittenSlice> slices;  // empty slices are not written
};

// Thread-safe (ranks may be threads). Error{io} with the system's reason; the temporary file is removed then.
// `phase` is called with the names of set_save_phase_hook as the work proceeds.
WrittenShard write_shard(const std::filesystem::path& directory, const ShardIdentity& identity, const StateView& view,
                         const std::function<void(const char*)>& phase);

}  // namespace shardtune
