#include "checkpoint/shard_writer.hpp"

#include <algorithm>
#include <string_view>
#include <utility>

#include <fmt/format.h>

#include "checkpoint/block_table.hpp"
#include "checkpoint/compressed_file.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"

namespace shardtune {
namespace {

// Hashes bytes on their way from memory to the file, cut where the file's blocks end: most blocks are then covered by
// one part, whose hash is the one that the block table has for them.
class PartHasher {
 public:
  // The bytes that will lie at `position` and follow those given before, or begin a new part.
  void add(const char* bytes, std::size_t size, std::uint64_t position) {
    if (!parts_.empty() && parts_.back().position + parts_.back().size != position) end_part();
    while (size > 0) {
      if (!is_open_) {
        parts_.push_back({.position = position});
        is_open_ = true;
      }
      const std::size_t count = std::min<std::size_t>(size, kBlockBytes - position % kBlockBytes);
      hash_.update(bytes, count);
      parts_.back().size += count;
      bytes += count, size -= count, position += count;
      if (position % kBlockBytes == 0) end_part();
    }
  }
  std::vector<WrittenPart> finish() {
    end_part();
    return std::move(parts_);
  }

 private:
  void end_part() {
    if (!std::exchange(is_open_, false)) return;
    parts_.back().hash = hash_.digest();
    hash_.reset();
  }

  std::vector<WrittenPart> parts_;
  HashStream hash_;
  bool is_open_ = false;  // the last part has not ended
};

// Hashes the file as it lies on the disk and compares every part of it with what was taken from memory.
BlockTable read_back(const std::filesystem::path& file, std::vector<WrittenPart> written, const PhaseHook& phase) {
  std::sort(written.begin(), written.end(), [](const auto& a, const auto& b) { return a.position < b.position; });
  auto next = written.begin();
  const auto compare = [&](std::uint64_t at, std::string_view block, std::uint64_t hash) {
    phase("part_read_back");
    for (; next != written.end() && next->position < at + block.size(); ++next) {
      const bool is_within = next->position >= at && next->position + next->size <= at + block.size();
      const bool is_whole = is_within && next->size == block.size();
      if (is_within && (is_whole ? hash : hash_bytes(block.substr(next->position - at, next->size))) == next->hash)
        continue;
      fail(ErrorKind::io, fmt::format("{}: what was read back is not what was written (bytes {} to {}); check the disk",
                                      file.string(), next->position, next->position + next->size));
    }
  };
  BlockTable table = hash_file(file, compare);
  if (next != written.end())
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

std::vector<WrittenPart> ShardWriter::write(PieceSource& source, const std::vector<std::uint64_t>& positions) {
  PartHasher hasher;
  try {
    if (!file_) file_.emplace(temporary_);
    const AlignedBuffer buffer = make_aligned_buffer(PieceSource::kPieceBytes);
    const auto hash = [&](const PieceSource::Piece& piece, std::size_t begin, std::size_t size) {
      hasher.add(buffer.get() + begin, size, positions[piece.slice] + piece.begin + begin);
    };
    while (const auto piece = source.take(buffer.get(), hash)) {
      file_->write(buffer.get(), piece->size, positions[piece->slice] + piece->begin);
      phase_("dataset_written");
    }
    phase_("shard_closed");
    file_->sync();
  } catch (...) {
    source.abandon();
    throw;
  }
  return hasher.finish();
}

WrittenShard ShardWriter::seal(std::vector<WrittenPart> parts) {
  BlockTable table = read_back(temporary_, std::move(parts), phase_);
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
