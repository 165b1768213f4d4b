#include "core/hash.hpp"

#include <fmt/format.h>
#include <xxhash.h>

namespace shardtune {

std::uint64_t hash_bytes(const void* data, std::size_t size) noexcept { return XXH3_64bits(data, size); }

std::string to_hex(std::uint64_t hash) { return fmt::format("{:016x}", hash); }

}  // namespace shardtune
