#pragma once
// Private to kernels/: sixteen-lane vectors in GCC's vector extension, and fp32, bf16 and fp16 numbers to and from them.
#include <cstdint>
#include <cstring>

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

// GCC warns that these vectors are passed otherwise where AVX-512 is off. Every function that takes or returns one is
// always inlined, so there is no call whose convention could differ. Not popped: the sources that include this private
// header define such functions too.
#pragma GCC diagnostic ignored "-Wpsabi"

#define SHARDTUNE_INLINE inline __attribute__((always_inline))

namespace shardtune::simd {

inline constexpr std::int64_t kLanes = 16;
using Float = float __attribute__((vector_size(64)));
using Int = std::int32_t __attribute__((vector_size(64)));
using Word = std::uint32_t __attribute__((vector_size(64)));
using Short = std::uint16_t __attribute__((vector_size(32)));

SHARDTUNE_INLINE Float broadcast(float value) { return Float{} + value; }

SHARDTUNE_INLINE Float load(const float* from) {
  Float value;
  std::memcpy(&value, from, sizeof value);
  return value;
}
SHARDTUNE_INLINE Float load(const c10::BFloat16* from) {
  Short half;
  std::memcpy(&half, from, sizeof half);
  const Word wide = __builtin_convertvector(half, Word) << 16;
  Float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
}
SHARDTUNE_INLINE void store(float* to, const Float& value) { std::memcpy(to, &value, sizeof value); }
// Round to nearest even, NaN stays NaN: the same as c10::BFloat16's conversion.
SHARDTUNE_INLINE void store(c10::BFloat16* to, const Float& value) {
  Word bits;
  std::memcpy(&bits, &value, sizeof bits);
  const Word rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  const Word chosen = value == value ? rounded : Word{} + 0x7FC0U;
  const Short half = __builtin_convertvector(chosen, Short);
  std::memcpy(to, &half, sizeof half);
}

// fp16: exact on the way in; on the way out rounded to nearest even as c10::Half does, too large a value becomes infinite.
SHARDTUNE_INLINE Float load(const c10::Half* from) {
  Short half;
  std::memcpy(&half, from, sizeof half);
  const Word wide = __builtin_convertvector(half, Word);
  const Word magnitude = wide & 0x7FFFU;
  // As the bits of a float the value is 2^-112 times too small, subnormals included; infinity and NaN keep their mantissa.
  const Word shifted = magnitude << 13;
  Float small;
  std::memcpy(&small, &shifted, sizeof small);
  const Float scaled = small * 0x1p112F;
  Word finite;
  std::memcpy(&finite, &scaled, sizeof finite);
  const Word bits = (magnitude >= 0x7C00U ? (shifted | 0x7F800000U) : finite) | ((wide & 0x8000U) << 16);
  Float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}
SHARDTUNE_INLINE void store(c10::Half* to, const Float& value) {
  Word all;
  std::memcpy(&all, &value, sizeof all);
  const Word sign = (all >> 16) & 0x8000U, magnitude = all & 0x7FFFFFFFU;
  Float absolute;
  std::memcpy(&absolute, &magnitude, sizeof absolute);
  const Word normal = (magnitude - (112U << 23) + 0xFFFU + ((magnitude >> 13) & 1U)) >> 13;
  // Below 2^-14 the addition of 1/2 makes the float unit round at the last place of a subnormal fp16.
  const Float shifted = absolute + 0.5F;
  Word subnormal;
  std::memcpy(&subnormal, &shifted, sizeof subnormal);
  subnormal -= 126U << 23;
  Word chosen = magnitude < (113U << 23) ? subnormal : normal;
  chosen = magnitude >= 0x477FF000U ? Word{} + 0x7C00U : chosen;  // 65520 and more
  chosen = magnitude > 0x7F800000U ? Word{} + 0x7E00U : chosen;   // NaN
  const Short half = __builtin_convertvector(chosen | sign, Short);
  std::memcpy(to, &half, sizeof half);
}

// What would be read back after a store as T.
template <class T>
SHARDTUNE_INLINE Float rounded_to(const Float& value) {
  T lanes[kLanes];
  store(lanes, value);
  return load(lanes);
}

// Tails: the missing lanes are filled with `filler` and not written back.
template <class T>
SHARDTUNE_INLINE Float load_some(const T* from, std::int64_t count, float filler) {
  T lanes[kLanes];
  for (std::int64_t i = 0; i < kLanes; ++i) lanes[i] = static_cast<T>(filler);
  std::memcpy(lanes, from, static_cast<std::size_t>(count) * sizeof(T));
  return load(lanes);
}
template <class T>
SHARDTUNE_INLINE void store_some(T* to, const Float& value, std::int64_t count) {
  T lanes[kLanes];
  store(lanes, value);
  std::memcpy(to, lanes, static_cast<std::size_t>(count) * sizeof(T));
}

// The vector at [at, at + kLanes) of `size` elements; lanes beyond them are `filler` and not written.
template <class T>
SHARDTUNE_INLINE Float load_at(const T* from, std::int64_t at, std::int64_t size, float filler = 0.0F) {
  return size - at >= kLanes ? load(from + at) : load_some(from + at, size - at, filler);
}
template <class T>
SHARDTUNE_INLINE void store_at(T* to, std::int64_t at, std::int64_t size, const Float& value) {
  if (size - at >= kLanes)
    store(to + at, value);
  else
    store_some(to + at, value, size - at);
}

// visit(at, end) for the vectors of a row of `size` elements, for load_at(.., at, end) and store_at(.., at, end): `end`
// is that of the vector where it is whole, so that they need no branch, and `size` for the rest.
template <class Visit>
SHARDTUNE_INLINE void for_each_vector(std::int64_t size, const Visit& visit) {
  std::int64_t at = 0;
  for (; at + kLanes <= size; at += kLanes) visit(at, at + kLanes);
  if (at < size) visit(at, size);
}

}  // namespace shardtune::simd
