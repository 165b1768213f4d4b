#include "distributed/comm/copy_bytes.hpp"

#include <cstring>

#if defined(__x86_64__)
#include <emmintrin.h>
#endif

namespace shardtune {
namespace {

#if defined(__x86_64__)
void stream(std::byte* to, const std::byte* from, std::int64_t bytes) noexcept {
  constexpr std::int64_t kLine = 64;
  const auto head = static_cast<std::int64_t>(-reinterpret_cast<std::uintptr_t>(to) % kLine);
  std::memcpy(to, from, static_cast<std::size_t>(head));
  std::int64_t done = head;
  for (; done + kLine <= bytes; done += kLine) {
    const auto* in = reinterpret_cast<const __m128i*>(from + done);
    auto* out = reinterpret_cast<__m128i*>(to + done);
    const __m128i a = _mm_loadu_si128(in);
    const __m128i b = _mm_loadu_si128(in + 1);
    const __m128i c = _mm_loadu_si128(in + 2);
    const __m128i d = _mm_loadu_si128(in + 3);
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
  }
  _mm_sfence();  // streamed bytes are not ordered with the counter that tells others of them
  std::memcpy(to + done, from + done, static_cast<std::size_t>(bytes - done));
}
#endif

}  // namespace

void copy_bytes(std::byte* to, const std::byte* from, std::int64_t bytes) noexcept {
  if (bytes <= 0 || to == from) return;
#if defined(__x86_64__)
  if (bytes >= kStreamBytes) return stream(to, from, bytes);
#endif
  std::memcpy(to, from, static_cast<std::size_t>(bytes));
}

}  // namespace shardtune
