#pragma once
// Writes one rank's slices as a serial HDF5 file with its block table, durably. Every return code counts, any failure
// discards the shard, and the finished file is read back and compared with what memory held before it counts as
// written.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include "checkpoint/piece_source.hpp"
#include "checkpoint/shard_layout.hpp"

namespace shardtune {

struct WrittenSlice {
  std::size_t slice = 0;          // index in the StateView
  std::uint64_t byte_offset = 0;  // of its first element in the file
};

struct WrittenShard {
  std::string file;
  std::uint64_t size = 0;
  std::uint64_t digest = 0;
  std::vector<WrittenSlice> slices;  // empty slices are not written
  double write_seconds = 0;          // until the data were durable, before they were read back
};

// Takes all pieces of the source. For a writer thread: communicates with nobody. Thread-safe (ranks may be threads).
// Error{io} with the system's reason; the temporary file is removed then and the source abandoned.
// `phase` is called with the names of set_save_phase_hook as the work proceeds.
WrittenShard write_shard(const std::filesystem::path& directory, const ShardIdentity& identity, PieceSource& source,
                         const std::function<void(const char*)>& phase);

}  // namespace shardtune
