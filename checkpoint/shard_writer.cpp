#include "checkpoint/shard_writer.hpp"

#include <algorithm>

#include <fmt/format.h>

#include "checkpoint/block_table.hpp"
#include "checkpoint/compressed_file.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"

namespace shardtune {
namespace {

// Hashes the file as it lies on the disk and compares every piece in it with what was taken from memory.
BlockTable read_back(const std::filesystem::path& file, std::vector<WrittenPiece> written, const PhaseHook& phase) {
  std::sort(written.begin(), written.end(), [](const auto& a, const auto& b) { return a.position < b.position; });
  std::size_t next = 0;
  HashStream hash;
  const auto compare = [&](std::uint64_t at, const char* bytes, std::size_t size) {
    phase("part_read_back");
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

ShardWriter::ShardWriter(const std::filesystem::path& directory, const ShardIdentity& identity, PhaseHook phase,
                         bool is_compressed)
    : directory_(directory),
      path_(directory / identity.file_name()),
      temporary_(path_.string() + ".tmp"),
      identity_(identity),
      phase_(std::move(phase)),
      is_compressed_(is_compressed) {}

std::vector<std::uint64_t> ShardWriter::lay_out(const StateView& whole) {
  file_.emplace(temporary_);
  positions_ = lay_out_shard(temporary_, identity_, whole);
  phase_("shard_created");
  return positions_;
}

std::vector<WrittenPiece> ShardWriter::write(PieceSource& source, const std::vector<std::uint64_t>& positions) {
  std::vector<WrittenPiece> written;
  try {
    if (!file_) file_.emplace(temporary_);
    const AlignedBuffer buffer = make_aligned_buffer(PieceSource::kPieceBytes);
    while (const auto piece = source.take(buffer.get())) {
      const std::uint64_t position = positions[piece->slice] + piece->begin;
      written.push_back({position, piece->size, hash_bytes(buffer.get(), piece->size)});
      file_->write(buffer.get(), piece->size, position);
      phase_("dataset_written");
    }
    phase_("shard_closed");
    file_->sync();
  } catch (...) {
    source.abandon();
    throw;
  }
  return written;
}

WrittenShard ShardWriter::seal(std::vector<WrittenPiece> pieces) {
  BlockTable table = read_back(temporary_, std::move(pieces), phase_);
  phase_("shard_synced");
  WrittenShard shard{.file = identity_.file_name(), .positions = positions_};
  std::filesystem::path target = path_;
  if (is_compressed_) {
    shard.file += ".sz";
    shard.raw_size = table.file_bytes;
    target = directory_ / shard.file;
    const std::filesystem::path compressed = target.string() + ".tmp";
    table = compress_file(temporary_, table, compressed);
    rename_path(compressed, target);
    std::error_code error;
    if (std::filesystem::remove(temporary_, error); error)
      fail_writing("remove", temporary_, error.value());
  } else {
    rename_path(temporary_, target);
  }
  fsync_path(directory_);
  phase_("shard_renamed");
  write_file_durably(block_table_path(target), table.serialize());
  phase_("block_table_written");
  shard.size = table.file_bytes;
  shard.digest = table.digest();
  return shard;
}

}  // namespace shardtune
