#pragma once
// A shard compressed without loss: blocks of 1 MiB, each with its bytes shuffled (all first bytes of its 4-byte words,
// then all second ones, ...) and compressed by zstd, so that any part can be read by itself. Layout in
// docs/checkpoint_format.md. Integrity is the block table's business, which covers the compressed bytes.
#include <cstdint>
#include <filesystem>
#include <vector>

#include "checkpoint/block_table.hpp"

namespace shardtune {

// Writes `to`, durably, reads it back against `table`, which is `from`'s, and returns the table of what was written.
// Constant memory. Error{io} on failure.
BlockTable compress_file(const std::filesystem::path& from, const BlockTable& table, const std::filesystem::path& to);

// Reads parts of the original; every byte of the compressed file that is used was verified. Not thread-safe.
class CompressedFile {
 public:
  // Of the manifest: `file_bytes` and `digest` of the compressed file, `raw_bytes` of the original. Error{data} when
  // the file does not fit them.
  CompressedFile(const std::filesystem::path& file, std::uint64_t file_bytes, std::uint64_t digest,
                 std::uint64_t raw_bytes);
  CompressedFile(const std::filesystem::path& file, VerifiedFile verified, std::uint64_t raw_bytes);
  void read(std::uint64_t begin, std::size_t size, void* into);
  std::uint64_t bytes_read() const noexcept { return file_.bytes_read(); }

 private:
  void load(std::uint64_t block);
  std::size_t raw_block_bytes(std::uint64_t block) const;

  std::filesystem::path path_;
  VerifiedFile file_;
  std::uint64_t raw_bytes_;
  std::vector<std::uint64_t> begins_;  // of the compressed blocks, and the end of the last
  std::vector<char> compressed_, shuffled_, block_;
  std::uint64_t loaded_ = ~std::uint64_t{0};
};

}  // namespace shardtune
