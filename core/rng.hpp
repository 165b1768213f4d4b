#pragma once
// Counter-based random numbers: Philox4x32-10 (Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC'11).
// Every number is a pure function of (key, counter), so recomputation, resuming and any number of ranks see the same
// values and no generator state is ever saved. Thread-safe (no state).
#include <array>
#include <cstdint>

namespace shardtune {

// Four independent 32-bit words for one 128-bit counter under one 64-bit key.
std::array<std::uint32_t, 4> philox4x32(std::uint64_t key, std::uint64_t counter_low, std::uint64_t counter_high) noexcept;

// Mixes values into a key (SplitMix64 finaliser); order matters. For deriving keys of streams: mix_key(seed, site, step...).
std::uint64_t mix_key(std::uint64_t a, std::uint64_t b) noexcept;
template <class... Rest>
std::uint64_t mix_key(std::uint64_t a, std::uint64_t b, std::uint64_t c, Rest... rest) noexcept {
  return mix_key(mix_key(a, b), c, rest...);
}

// A sequential view over one stream, for shuffles and initialisation. Not thread-safe; cheap to construct.
class PhiloxStream {
 public:
  explicit PhiloxStream(std::uint64_t key) noexcept : key_(key) {}
  std::uint32_t next_u32() noexcept;
  std::uint64_t next_u64() noexcept;
  // Uniform integer in [0, bound), bound > 0, without modulo bias.
  std::uint64_t next_below(std::uint64_t bound) noexcept;
  double next_uniform() noexcept;  // [0, 1), 53 bits
  double next_normal() noexcept;   // mean 0, deviation 1 (Box-Muller; one of the pair is dropped)

 private:
  std::uint64_t key_;
  std::uint64_t counter_ = 0;
  std::array<std::uint32_t, 4> words_{};
  int used_ = 4;
};

}  // namespace shardtune
