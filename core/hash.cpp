#include "core/hash.hpp"

#include <algorithm>
#include <new>
#include <vector>

#include <fmt/format.h>
#include <xxhash.h>

#include "core/file.hpp"

namespace shardtune {

std::uint64_t hash_bytes(const void* data, std::size_t size) noexcept { return XXH3_64bits(data, size); }

HashStream::HashStream() : state_(XXH3_createState()) {
  if (!state_) throw std::bad_alloc();
  reset();
}

void HashStream::update(const void* data, std::size_t size) noexcept { XXH3_64bits_update(state_.get(), data, size); }

std::uint64_t HashStream::digest() const noexcept { return XXH3_64bits_digest(state_.get()); }

void HashStream::reset() noexcept { XXH3_64bits_reset(state_.get()); }

void HashStream::StateTraits::destroy(XXH3_state_s* state) noexcept { XXH3_freeState(state); }

std::uint64_t hash_file_bytes(const std::filesystem::path& file) {
  constexpr std::uint64_t kPiece = 1 << 20;
  const UniqueFd fd = open_for_reading(file);
  const std::uint64_t size = file_size(fd.get(), file);
  std::vector<char> piece(std::min(size, kPiece));
  HashStream stream;
  for (std::uint64_t at = 0; at < size; at += kPiece) {
    const std::size_t count = std::min(kPiece, size - at);
    pread_exactly(fd.get(), piece.data(), count, at, file);
    stream.update(piece.data(), count);
  }
  return stream.digest();
}

std::string to_hex(std::uint64_t hash) { return fmt::format("{:016x}", hash); }

}  // namespace shardtune
