#include "core/hash.hpp"

#include <new>

#include <fmt/format.h>
#include <xxhash.h>

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

std::string to_hex(std::uint64_t hash) { return fmt::format("{:016x}", hash); }

}  // namespace shardtune
