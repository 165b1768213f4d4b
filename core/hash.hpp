#pragma once
// The one hash of the project: XXH3-64 (xxHash library), little-endian machines only. Thread-safe.
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <string>
#include <string_view>

#include "core/handle.hpp"

struct XXH3_state_s;

namespace shardtune {

std::uint64_t hash_bytes(const void* data, std::size_t size) noexcept;
inline std::uint64_t hash_bytes(std::string_view text) noexcept { return hash_bytes(text.data(), text.size()); }

// The same hash of bytes that come in parts. Not thread-safe.
class HashStream {
 public:
  HashStream();
  void update(const void* data, std::size_t size) noexcept;
  std::uint64_t digest() const noexcept;  // of all bytes since construction or reset()
  void reset() noexcept;

 private:
  struct StateTraits {
    static XXH3_state_s* null() noexcept { return nullptr; }
    static void destroy(XXH3_state_s* state) noexcept;
  };
  UniqueHandle<XXH3_state_s*, StateTraits> state_;
};

// Of a whole file, read in pieces. Error{data} when it cannot be read.
std::uint64_t hash_file_bytes(const std::filesystem::path& file);
std::string to_hex(std::uint64_t hash);  // 16 lower-case digits

}  // namespace shardtune
