#include "checkpoint/shard_writer.hpp"

#include <algorithm>
#include <chrono>

#include <fmt/format.h>
#include <unistd.h>

#include "checkpoint/block_table.hpp"
#include "checkpoint/direct_file.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"

namespace shardtune {
namespace {

// What a part of the file must hold.
struct Written {
  std::uint64_t position = 0;
  std::size_t size = 0;
  std::uint64_t hash = 0;
};

std::vector<Written> write_pieces(DirectFile& file, const std::vector<std::uint64_t>& positions, PieceSource& source,
                                  const std::function<void(const char*)>& phase) {
  std::vector<Written> written;
  const AlignedBuffer buffer = make_aligned_buffer(PieceSource::kPieceBytes);
  while (const auto piece = source.take(buffer.get())) {
    const std::uint64_t position = positions[piece->slice] + piece->begin;
    written.push_back({position, piece->size, hash_bytes(buffer.get(), piece->size)});
    file.write(buffer.get(), piece->size, position);
    phase("dataset_written");
  }
  return written;
}

// Hashes the file as it lies on the disk and compares every piece in it with what was taken from memory.
BlockTable read_back(const std::filesystem::path& file, std::vector<Written> written) {
  std::sort(written.begin(), written.end(), [](const auto& a, const auto& b) { return a.position < b.position; });
  std::size_t next = 0;
  HashStream hash;
  const auto compare = [&](std::uint64_t at, const char* bytes, std::size_t size) {
    while (next < written.size() && written[next].position < at + size) {
      const std::uint64_t begin = std::max(written[next].position, at);
      const std::uint64_t end_of_piece = written[next].position + written[next].size;
      const std::uint64_t end = std::min(end_of_piece, at + size);
      hash.update(bytes + (begin - at), end - begin);
      if (end_of_piece > at + size) return;
      if (hash.digest() != written[next].hash)
        fail(ErrorKind::io,
             fmt::format("{}: what was read back is not what was written (bytes {} to {}); check the disk",
                         file.string(), written[next].position, end_of_piece));
      hash.reset();
      ++next;
    }
  };
  BlockTable table = hash_file(file, compare);
  if (next != written.size())
    fail(ErrorKind::io, fmt::format("{} is shorter than what was written to it", file.string()));
  return table;
}

}  // namespace

WrittenShard write_shard(const std::filesystem::path& directory, const ShardIdentity& identity, PieceSource& source,
                         const std::function<void(const char*)>& phase) {
  WrittenShard result;
  result.file = identity.file_name();
  const std::filesystem::path path = directory / result.file;
  const std::filesystem::path temporary = path.string() + ".tmp";
  try {
    const auto start = std::chrono::steady_clock::now();
    // Open before HDF5 writes and synced through this descriptor: a write-back error in between is reported to it.
    DirectFile file(temporary);
    const std::vector<std::uint64_t> positions = lay_out_shard(temporary, identity, source.view());
    phase("shard_created");
    const std::vector<Written> written = write_pieces(file, positions, source, phase);
    phase("shard_closed");
    file.sync();
    result.write_seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    const BlockTable table = read_back(temporary, written);
    phase("shard_synced");
    rename_path(temporary, path);
    fsync_path(directory);
    phase("shard_renamed");
    write_file_durably(block_table_path(path), table.serialize());
    phase("block_table_written");
    result.size = table.file_bytes;
    result.digest = table.digest();
    for (std::size_t i = 0; i < positions.size(); ++i)
      if (source.view().slices[i].data.numel() > 0) result.slices.push_back({i, positions[i]});
  } catch (...) {
    source.abandon();
    ::unlink(temporary.c_str());
    throw;
  }
  return result;
}

}  // namespace shardtune
