#pragma once
// XXH3-64 of every 1 MiB block of a file: what makes partial reads verifiable. A table is stored beside its file as
// FILE.xxh3 (format: docs/checkpoint_format.md); its digest stands in the manifest.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <string_view>
#include <vector>

#include "core/file.hpp"

namespace shardtune {

inline constexpr std::uint64_t kBlockBytes = std::uint64_t{1} << 20;

struct BlockTable {
  std::uint64_t file_bytes = 0;
  std::vector<std::uint64_t> hashes;  // one per block; the last block may be short

  std::string serialize() const;  // content of FILE.xxh3; its last 8 bytes are digest()
  std::uint64_t digest() const;   // covers file size and all hashes
};

// Error{data} naming `origin` when the bytes are no table or are damaged.
BlockTable parse_block_table(std::string_view bytes, const std::filesystem::path& origin);

// Reads the whole file once, past the page cache. `inspect` (optional) sees every block with its offset in the file and
// its hash.
using InspectBytes = std::function<void(std::uint64_t offset, std::string_view bytes, std::uint64_t hash)>;
BlockTable hash_file(const std::filesystem::path& file, const InspectBytes& inspect = nullptr);

// Reads parts of a file; every byte handed out belongs to a block whose hash was checked after reading it.
// Ranges in ascending order cost at most one block more than their sum. Not thread-safe.
class VerifiedFile {
 public:
  // `digest` is the manifest's. Error{data} when the file, its size or its table do not fit.
  VerifiedFile(std::filesystem::path file, std::uint64_t file_bytes, std::uint64_t digest);
  VerifiedFile(std::filesystem::path file, BlockTable table);  // that is known already
  void read(std::uint64_t begin, std::size_t size, void* into);
  std::uint64_t bytes_read() const noexcept { return bytes_read_; }
  std::uint64_t file_bytes() const noexcept { return table_.file_bytes; }

 private:
  std::size_t block_bytes(std::uint64_t block) const;
  void check_block(std::uint64_t block, const char* bytes) const;
  void load_into_cache(std::uint64_t block);

  std::filesystem::path file_;
  BlockTable table_;
  UniqueFd fd_;
  std::vector<char> cache_;
  std::uint64_t cached_block_ = ~std::uint64_t{0};
  std::uint64_t bytes_read_ = 0;
};

std::filesystem::path block_table_path(const std::filesystem::path& file);

}  // namespace shardtune
