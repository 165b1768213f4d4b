#include "checkpoint/block_table.hpp"

#include <algorithm>
#include <cstring>

#include <fmt/format.h>

#include "checkpoint/direct_file.hpp"
#include "core/error.hpp"
#include "core/hash.hpp"

namespace shardtune {
namespace {

constexpr std::string_view kMagic = "SHTBLKS1";
constexpr std::uint64_t kBlocksPerRead = 8;

struct Header {
  char magic[8];
  std::uint64_t block_bytes;
  std::uint64_t file_bytes;
  std::uint64_t num_blocks;
};
static_assert(sizeof(Header) == 32);

std::uint64_t num_blocks(std::uint64_t file_bytes) {
  return file_bytes / kBlockBytes + (file_bytes % kBlockBytes != 0);
}

std::string body(const BlockTable& table) {
  Header header{};
  std::memcpy(header.magic, kMagic.data(), kMagic.size());
  header.block_bytes = kBlockBytes;
  header.file_bytes = table.file_bytes;
  header.num_blocks = table.hashes.size();
  std::string bytes(reinterpret_cast<const char*>(&header), sizeof(header));
  bytes.append(reinterpret_cast<const char*>(table.hashes.data()), table.hashes.size() * sizeof(std::uint64_t));
  return bytes;
}

}  // namespace

std::string BlockTable::serialize() const {
  std::string bytes = body(*this);
  const std::uint64_t hash = hash_bytes(bytes);
  return bytes.append(reinterpret_cast<const char*>(&hash), sizeof(hash));
}

std::uint64_t BlockTable::digest() const { return hash_bytes(body(*this)); }

BlockTable parse_block_table(std::string_view bytes, const std::filesystem::path& origin) {
  const auto refuse = [&](const char* what) {
    fail(ErrorKind::data, fmt::format("{} is damaged: {}", origin.string(), what));
  };
  Header header{};
  if (bytes.size() < sizeof(header) + 8) refuse("it is too short for a block table");
  std::memcpy(&header, bytes.data(), sizeof(header));
  if (std::string_view(header.magic, sizeof(header.magic)) != kMagic || header.block_bytes != kBlockBytes)
    refuse("its header is not that of a block table");
  if (header.num_blocks != num_blocks(header.file_bytes) ||
      header.num_blocks != (bytes.size() - sizeof(header) - 8) / 8 || bytes.size() % 8 != 0)
    refuse("its size does not fit the number of blocks");
  std::uint64_t stored = 0;
  std::memcpy(&stored, bytes.data() + bytes.size() - 8, 8);
  if (stored != hash_bytes(bytes.substr(0, bytes.size() - 8))) refuse("its checksum does not hold");
  BlockTable table;
  table.file_bytes = header.file_bytes;
  table.hashes.resize(header.num_blocks);
  if (header.num_blocks > 0) std::memcpy(table.hashes.data(), bytes.data() + sizeof(header), header.num_blocks * 8);
  return table;
}

BlockTable hash_file(const std::filesystem::path& file, const InspectBytes& inspect) {
  DirectReader reader(file);
  BlockTable table;
  table.file_bytes = reader.file_bytes();
  table.hashes.reserve(num_blocks(table.file_bytes));
  const auto buffer_bytes = static_cast<std::size_t>(std::min(table.file_bytes, kBlocksPerRead * kBlockBytes));
  const AlignedBuffer buffer = make_aligned_buffer(std::max<std::size_t>(buffer_bytes, 1));
  for (std::uint64_t at = 0; at < table.file_bytes;) {
    const auto size = static_cast<std::size_t>(std::min<std::uint64_t>(buffer_bytes, table.file_bytes - at));
    reader.read(buffer.get(), size, at);
    for (std::size_t i = 0; i < size; i += kBlockBytes) {
      const std::size_t block_size = std::min<std::size_t>(kBlockBytes, size - i);
      table.hashes.push_back(hash_bytes(buffer.get() + i, block_size));
      // While the block lies in the processor's cache.
      if (inspect) inspect(at + i, {buffer.get() + i, block_size}, table.hashes.back());
    }
    at += size;
  }
  return table;
}

std::filesystem::path block_table_path(const std::filesystem::path& file) { return file.string() + ".xxh3"; }

namespace {

BlockTable read_table(const std::filesystem::path& file, std::uint64_t file_bytes, std::uint64_t digest) {
  const std::filesystem::path table_file = block_table_path(file);
  BlockTable table = parse_block_table(read_file(table_file), table_file);
  if (table.file_bytes != file_bytes || table.digest() != digest)
    fail(ErrorKind::data, fmt::format("{} does not belong to this checkpoint: the manifest has another digest for it",
                                      table_file.string()));
  return table;
}

}  // namespace

VerifiedFile::VerifiedFile(std::filesystem::path file, std::uint64_t file_bytes, std::uint64_t digest)
    : VerifiedFile(file, read_table(file, file_bytes, digest)) {}

VerifiedFile::VerifiedFile(std::filesystem::path file, BlockTable table)
    : file_(std::move(file)), table_(std::move(table)), fd_(open_for_reading(file_)) {
  const std::uint64_t actual = shardtune::file_size(fd_.get(), file_);
  if (actual != table_.file_bytes)
    fail(ErrorKind::data,
         fmt::format("{} has {} bytes, the manifest says {}", file_.string(), actual, table_.file_bytes));
}

std::size_t VerifiedFile::block_bytes(std::uint64_t block) const {
  return static_cast<std::size_t>(std::min(kBlockBytes, table_.file_bytes - block * kBlockBytes));
}

void VerifiedFile::check_block(std::uint64_t block, const char* bytes) const {
  if (hash_bytes(bytes, block_bytes(block)) != table_.hashes[block])
    fail(ErrorKind::data, fmt::format("{} is damaged: bytes {} to {} do not fit their checksum; use another checkpoint",
                                      file_.string(), block * kBlockBytes, block * kBlockBytes + block_bytes(block)));
}

void VerifiedFile::load_into_cache(std::uint64_t block) {
  if (cached_block_ == block) return;
  cache_.resize(kBlockBytes);
  cached_block_ = ~std::uint64_t{0};
  pread_exactly(fd_.get(), cache_.data(), block_bytes(block), block * kBlockBytes, file_);
  bytes_read_ += block_bytes(block);
  check_block(block, cache_.data());
  cached_block_ = block;
}

void VerifiedFile::read(std::uint64_t begin, std::size_t size, void* into) {
  check_internal(begin <= table_.file_bytes && size <= table_.file_bytes - begin,
                 "VerifiedFile::read outside of the file");
  auto* out = static_cast<char*>(into);
  while (size > 0) {
    const std::uint64_t block = begin / kBlockBytes;
    const auto within = static_cast<std::size_t>(begin % kBlockBytes);
    if (within == 0 && size >= block_bytes(block) && cached_block_ != block) {
      // Whole blocks go straight to their destination and are checked there.
      std::size_t run = 0;
      std::uint64_t last = block;
      for (; last < table_.hashes.size() && last < block + kBlocksPerRead && run + block_bytes(last) <= size; ++last)
        run += block_bytes(last);
      pread_exactly(fd_.get(), out, run, begin, file_);
      bytes_read_ += run;
      for (std::uint64_t b = block; b < last; ++b) check_block(b, out + (b - block) * kBlockBytes);
      out += run, begin += run, size -= run;
      continue;
    }
    load_into_cache(block);
    const std::size_t piece = std::min(size, block_bytes(block) - within);
    std::memcpy(out, cache_.data() + within, piece);
    out += piece, begin += piece, size -= piece;
  }
}

}  // namespace shardtune
