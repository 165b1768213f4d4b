#pragma once
// Writes a serial HDF5 file with its block table, durably; several ranks of one host may write one file together. Every
// return code counts, any failure discards the file, and when it is finished it is read back and compared with what
// memory held before it counts as written.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <optional>
#include <string>
#include <vector>

#include "checkpoint/direct_file.hpp"
#include "checkpoint/piece_source.hpp"
#include "checkpoint/shard_layout.hpp"

namespace shardtune {

// What a part of the file must hold; it lies within one block of the block table.
struct WrittenPart {
  std::uint64_t position = 0, size = 0, hash = 0;
};

struct WrittenShard {
  std::string file;
  std::uint64_t size = 0, digest = 0;
  std::uint64_t raw_size = 0;            // before compression; 0 = not compressed
  std::vector<std::uint64_t> positions;  // of the slices of the view that was laid out
};

// Called with the names of set_save_phase_hook as the work proceeds.
using PhaseHook = std::function<void(const char*)>;

// One file: its owner calls lay_out(), then every rank that has slices in it write(), then the owner seal(); each call
// on the rank's own object, all ranks done with one before the next begins. Communicates with nobody. Error{io} with
// the system's reason; what was written then goes with the partial directory.
class ShardWriter {
 public:
  // Compressed shards are called FILE.sz; the original is written first and goes when it was compressed.
  ShardWriter(const std::filesystem::path& directory, const ShardIdentity& identity, PhaseHook phase,
              bool is_compressed = false);

  // `whole` lists the slices of all ranks of the file. Returns the position of each.
  std::vector<std::uint64_t> lay_out(const StateView& whole);
  // Takes all pieces of the source; positions are those of its slices. Durable on return. The source is abandoned by a
  // failure.
  std::vector<WrittenPart> write(PieceSource& source, const std::vector<std::uint64_t>& positions);
  // `parts` of all ranks.
  WrittenShard seal(std::vector<WrittenPart> parts);

 private:
  std::filesystem::path directory_, path_, temporary_;
  ShardIdentity identity_;
  PhaseHook phase_;
  bool is_compressed_;
  std::vector<std::uint64_t> positions_;
  // Open before HDF5 writes and synced through this descriptor: a write-back error in between is reported to it.
  std::optional<DirectFile> file_;
};

}  // namespace shardtune
