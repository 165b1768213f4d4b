#pragma once
// The one hash of the project: XXH3-64 (xxHash library), little-endian machines only. Thread-safe.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>

namespace shardtune {

std::uint64_t hash_bytes(const void* data, std::size_t size) noexcept;
inline std::uint64_t hash_bytes(std::string_view text) noexcept { return hash_bytes(text.data(), text.size()); }
std::string to_hex(std::uint64_t hash);  // 16 lower-case digits

}  // namespace shardtune
