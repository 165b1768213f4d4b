#pragma once
// Large writes at given positions, past the page cache (O_DIRECT) where the file system allows it: there a checkpoint
// neither pushes out what training needs nor waits for write-back. Elsewhere the same writes go through the cache.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <memory>

#include "core/file.hpp"

namespace shardtune {

class DirectFile {
 public:
  // Creates the file, or opens it as it is. Error{io}, as for the other functions.
  explicit DirectFile(std::filesystem::path file);

  // The part of the bytes that covers whole pages of the file goes past the cache, provided that `bytes` and
  // `position` are multiples of 4096; the rest goes through it. A page must not be written both ways. Not thread-safe.
  void write(const void* bytes, std::size_t size, std::uint64_t position);
  // Everything written so far is durable, whichever way and by whichever descriptor it was written. A failure is final:
  // the kernel may have dropped the data.
  void sync();
  bool is_direct() const noexcept { return static_cast<bool>(direct_); }

 private:
  std::filesystem::path file_;
  UniqueFd cached_, direct_;
};

// Memory that may be written and read past the cache; in huge pages where they fit, which are cheaper to fill.
struct AlignedDelete {
  void operator()(char* bytes) const noexcept;
};
using AlignedBuffer = std::unique_ptr<char[], AlignedDelete>;
AlignedBuffer make_aligned_buffer(std::size_t size);

// Reads a file in order past the page cache, likewise: reading gigabytes once must not push out what training needs,
// and what is read back after a sync comes from the disk.
class DirectReader {
 public:
  // Error{data} when the file cannot be opened or read.
  explicit DirectReader(std::filesystem::path file);
  std::uint64_t file_bytes() const noexcept { return file_bytes_; }
  // Exactly `size` bytes. `into` is an aligned buffer of at least `size` bytes rounded up to pages, `position` a
  // multiple of 4096. Error{data} when the file ends early. Not thread-safe.
  void read(char* into, std::size_t size, std::uint64_t position);

 private:
  std::filesystem::path file_;
  UniqueFd cached_, direct_;
  std::uint64_t file_bytes_;
};

}  // namespace shardtune
