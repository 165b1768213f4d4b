#include "core/rng.hpp"

#include <cmath>

namespace shardtune {
namespace {
constexpr std::uint32_t kMultiplierA = 0xD2511F53U, kMultiplierB = 0xCD9E8D57U;
constexpr std::uint32_t kWeylA = 0x9E3779B9U, kWeylB = 0xBB67AE85U;
}  // namespace

std::array<std::uint32_t, 4> philox4x32(std::uint64_t key, std::uint64_t counter_low, std::uint64_t counter_high) noexcept {
  std::array<std::uint32_t, 4> c{static_cast<std::uint32_t>(counter_low), static_cast<std::uint32_t>(counter_low >> 32),
                                 static_cast<std::uint32_t>(counter_high), static_cast<std::uint32_t>(counter_high >> 32)};
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t a = std::uint64_t{kMultiplierA} * c[0], b = std::uint64_t{kMultiplierB} * c[2];
    c = {static_cast<std::uint32_t>(b >> 32) ^ c[1] ^ k0, static_cast<std::uint32_t>(b),
         static_cast<std::uint32_t>(a >> 32) ^ c[3] ^ k1, static_cast<std::uint32_t>(a)};
    k0 += kWeylA;
    k1 += kWeylB;
  }
  return c;
}

std::uint64_t mix_key(std::uint64_t a, std::uint64_t b) noexcept {
  std::uint64_t z = a * 0x9E3779B97F4A7C15ULL + b + 0x632BE59BD9B4E019ULL;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9ULL;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBULL;
  return z ^ (z >> 31);
}

std::uint32_t PhiloxStream::next_u32() noexcept {
  if (used_ == 4) {
    words_ = philox4x32(key_, counter_++, 0);
    used_ = 0;
  }
  return words_[static_cast<std::size_t>(used_++)];
}

std::uint64_t PhiloxStream::next_u64() noexcept {
  const std::uint64_t high = next_u32();
  return (high << 32) | next_u32();
}

std::uint64_t PhiloxStream::next_below(std::uint64_t bound) noexcept {
  // Rejection keeps every residue equally likely.
  const std::uint64_t limit = bound * (UINT64_MAX / bound);
  for (;;) {
    const std::uint64_t value = next_u64();
    if (value < limit) return value % bound;
  }
}

double PhiloxStream::next_uniform() noexcept { return static_cast<double>(next_u64() >> 11) * 0x1.0p-53; }

double PhiloxStream::next_normal() noexcept {
  const double u = 1.0 - next_uniform();  // (0, 1]: the logarithm is finite
  return std::sqrt(-2.0 * std::log(u)) * std::cos(6.283185307179586 * next_uniform());
}

}  // namespace shardtune
