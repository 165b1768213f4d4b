#pragma once
// Copying between ranks' memory. Internal to distributed/comm.
#include <cstddef>
#include <cstdint>

namespace shardtune {

// As memcpy; nothing where `to` is `from`. From kStreamBytes on with stores that go past the caches: ordinary ones read
// every line of the target first, which is half again as much traffic where memory is the bound.
void copy_bytes(std::byte* to, const std::byte* from, std::int64_t bytes) noexcept;

inline constexpr std::int64_t kStreamBytes = 8 << 20;

}  // namespace shardtune
