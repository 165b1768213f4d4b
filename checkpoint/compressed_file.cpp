#include "checkpoint/compressed_file.hpp"

#include <algorithm>
#include <cerrno>
#include <cstring>
#include <memory>
#include <utility>

#include <fcntl.h>
#include <fmt/format.h>
#include <zstd.h>

#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"

namespace shardtune {
namespace {

constexpr int kLevel = 1;  // higher levels gain nothing on weights and moments
constexpr std::size_t kWord = 4;
constexpr char kMagic[9] = "SHTCOMP1";
constexpr std::uint64_t kTailBytes = 16;  // number of blocks, magic

// The bytes behind the last whole word stay where they are.
void shuffle(const char* from, std::size_t size, char* to) {
  const std::size_t words = size / kWord;
  for (std::size_t byte = 0; byte < kWord; ++byte)
    for (std::size_t i = 0; i < words; ++i) to[byte * words + i] = from[i * kWord + byte];
  std::memcpy(to + words * kWord, from + words * kWord, size - words * kWord);
}

void unshuffle(const char* from, std::size_t size, char* to) {
  const std::size_t words = size / kWord;
  for (std::size_t byte = 0; byte < kWord; ++byte)
    for (std::size_t i = 0; i < words; ++i) to[i * kWord + byte] = from[byte * words + i];
  std::memcpy(to + words * kWord, from + words * kWord, size - words * kWord);
}

struct FreeContext {
  void operator()(ZSTD_CCtx* context) const noexcept { ZSTD_freeCCtx(context); }
};

void write_compressed(const std::filesystem::path& from, std::uint64_t raw_bytes, const std::filesystem::path& to) {
  const UniqueFd source = open_for_reading(from);
  const UniqueFd target(::open(to.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0644));
  if (!target) fail_writing("create", to, errno);
  const std::unique_ptr<ZSTD_CCtx, FreeContext> context(ZSTD_createCCtx());
  std::vector<char> raw(kBlockBytes), shuffled(kBlockBytes);
  std::string out(ZSTD_compressBound(kBlockBytes), '\0'), index;
  std::uint64_t num_blocks = 0;
  for (std::uint64_t at = 0; at < raw_bytes; at += kBlockBytes, ++num_blocks) {
    const auto size = static_cast<std::size_t>(std::min(kBlockBytes, raw_bytes - at));
    pread_exactly(source.get(), raw.data(), size, at, from);
    shuffle(raw.data(), size, shuffled.data());
    const std::size_t written = ZSTD_compressCCtx(context.get(), out.data(), out.size(), shuffled.data(), size, kLevel);
    if (ZSTD_isError(written) != 0)
      fail(ErrorKind::io, fmt::format("cannot compress {}: {}", from.string(), ZSTD_getErrorName(written)));
    write_all(target.get(), std::string_view(out).substr(0, written), to);
    const auto entry = static_cast<std::uint32_t>(written);
    index.append(reinterpret_cast<const char*>(&entry), sizeof entry);
  }
  index.append(reinterpret_cast<const char*>(&num_blocks), sizeof num_blocks).append(kMagic, 8);
  write_all(target.get(), index, to);
  if (::fsync(target.get()) != 0) fail_writing("sync", to, errno);
}

}  // namespace

CompressedFile::CompressedFile(const std::filesystem::path& file, std::uint64_t file_bytes, std::uint64_t digest,
                               std::uint64_t raw_bytes)
    : CompressedFile(file, VerifiedFile(file, file_bytes, digest), raw_bytes) {}

CompressedFile::CompressedFile(const std::filesystem::path& file, VerifiedFile verified, std::uint64_t raw_bytes)
    : path_(file), file_(std::move(verified)), raw_bytes_(raw_bytes) {
  const std::uint64_t file_bytes = file_.file_bytes();
  const auto refuse = [&](const char* what) { fail(ErrorKind::data, fmt::format("{}: {}", path_.string(), what)); };
  char tail[kTailBytes];
  if (file_bytes < kTailBytes) refuse("too short for a compressed shard");
  file_.read(file_bytes - kTailBytes, kTailBytes, tail);
  std::uint64_t num_blocks = 0;
  std::memcpy(&num_blocks, tail, 8);
  if (std::memcmp(tail + 8, kMagic, 8) != 0) refuse("no compressed shard");
  if (num_blocks != (raw_bytes + kBlockBytes - 1) / kBlockBytes || num_blocks > (file_bytes - kTailBytes) / 4)
    refuse("the compressed shard has another number of blocks than the manifest says");
  std::vector<std::uint32_t> sizes(num_blocks);
  const std::uint64_t data_end = file_bytes - kTailBytes - num_blocks * 4;
  file_.read(data_end, num_blocks * 4, sizes.data());
  begins_.assign(1, 0);
  for (const std::uint32_t size : sizes) begins_.push_back(begins_.back() + size);
  if (begins_.back() != data_end) refuse("the blocks of the compressed shard do not fill it");
}

std::size_t CompressedFile::raw_block_bytes(std::uint64_t block) const {
  return static_cast<std::size_t>(std::min(kBlockBytes, raw_bytes_ - block * kBlockBytes));
}

void CompressedFile::load(std::uint64_t block) {
  if (loaded_ == block) return;
  loaded_ = ~std::uint64_t{0};
  const auto size = static_cast<std::size_t>(begins_[block + 1] - begins_[block]);
  const std::size_t raw_size = raw_block_bytes(block);
  if (size > ZSTD_compressBound(kBlockBytes))
    fail(ErrorKind::data, fmt::format("{}: block {} is larger than a block can be", path_.string(), block));
  compressed_.resize(size);
  shuffled_.resize(kBlockBytes);
  block_.resize(kBlockBytes);
  file_.read(begins_[block], size, compressed_.data());
  const std::size_t found = ZSTD_decompress(shuffled_.data(), raw_size, compressed_.data(), size);
  if (found != raw_size)
    fail(ErrorKind::data, fmt::format("{}: block {} cannot be decompressed", path_.string(), block));
  unshuffle(shuffled_.data(), raw_size, block_.data());
  loaded_ = block;
}

void CompressedFile::read(std::uint64_t begin, std::size_t size, void* into) {
  check_internal(begin <= raw_bytes_ && size <= raw_bytes_ - begin, "CompressedFile::read outside of the file");
  for (auto* out = static_cast<char*>(into); size > 0;) {
    const std::uint64_t block = begin / kBlockBytes;
    const auto within = static_cast<std::size_t>(begin % kBlockBytes);
    load(block);
    const std::size_t piece = std::min(size, raw_block_bytes(block) - within);
    std::memcpy(out, block_.data() + within, piece);
    out += piece, begin += piece, size -= piece;
  }
}

BlockTable compress_file(const std::filesystem::path& from, const BlockTable& table, const std::filesystem::path& to) {
  write_compressed(from, table.file_bytes, to);
  // What a reader will do, with the bytes of the disk.
  BlockTable written = hash_file(to);
  CompressedFile reader(to, VerifiedFile(to, written), table.file_bytes);
  std::vector<char> block(kBlockBytes);
  for (std::size_t i = 0; i < table.hashes.size(); ++i) {
    const std::uint64_t begin = i * kBlockBytes;
    const auto size = static_cast<std::size_t>(std::min(kBlockBytes, table.file_bytes - begin));
    reader.read(begin, size, block.data());
    if (hash_bytes(block.data(), size) != table.hashes[i])
      fail(ErrorKind::io,
           fmt::format("{}: what was read back is not what was compressed (bytes {} to {}); check the disk",
                       to.string(), begin, begin + size));
  }
  return written;
}

}  // namespace shardtune
