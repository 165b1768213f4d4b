#pragma once
// Private to kernels/: sixteen-lane vectors in GCC's vector extension and a run-time choice of the instruction set.
// The lane structure is the same on every instruction set and the sources are compiled without FMA contraction, so
// AVX-512, AVX2 and SSE2 give the same bits.
#include <cstdint>
#include <cstring>
#include <limits>

#include "kernels/instruction_set.hpp"
#include "kernels/simd_memory.hpp"

namespace shardtune::simd {

// Lanes are added in a fixed tree, halves of the vector to each other.
SHARDTUNE_INLINE double sum_lanes(const Float& value) {
  using HalfOfFloat = float __attribute__((vector_size(32)));
  using Double = double __attribute__((vector_size(64)));
  using HalfOfDouble = double __attribute__((vector_size(32)));
  HalfOfFloat halves[2];
  std::memcpy(halves, &value, sizeof value);
  const Double eight = __builtin_convertvector(halves[0], Double) + __builtin_convertvector(halves[1], Double);
  HalfOfDouble fours[2];
  std::memcpy(fours, &eight, sizeof eight);
  const HalfOfDouble four = fours[0] + fours[1];
  return (four[0] + four[2]) + (four[1] + four[3]);
}

SHARDTUNE_INLINE Float negative_magnitude(const Float& x) {
  Word bits;
  std::memcpy(&bits, &x, sizeof bits);
  bits |= 0x80000000U;
  Float result;
  std::memcpy(&result, &bits, sizeof result);
  return result;
}

// e^x for kLeastExponent <= x <= 0: Cody-Waite reduction and the degree-6 polynomial of Cephes' expf; relative error
// below 2e-7. NaN stays NaN.
inline constexpr float kLeastExponent = -87.33F;
SHARDTUNE_INLINE Float exp_bounded(const Float& x) {
  const Int exponent = __builtin_convertvector(x * 1.44269504088896341F - 0.5F, Int);  // rounds: operand < 0
  const Float n = __builtin_convertvector(exponent, Float);
  const Float r = (x - n * 0.693359375F) + n * 2.12194440e-4F;
  Float p = broadcast(1.9875691500e-4F);
  p = p * r + 1.3981999507e-3F;
  p = p * r + 8.3334519073e-3F;
  p = p * r + 4.1665795894e-2F;
  p = p * r + 1.6666665459e-1F;
  p = p * r + 5.0000001201e-1F;
  p = p * r * r + r + 1.0F;
  const Int power_bits = (exponent + 127) << 23;
  Float power;
  std::memcpy(&power, &power_bits, sizeof power);
  return p * power;
}

// e^x for x <= 0. Below kLeastExponent the result is 0 (so is e^-inf); NaN stays NaN.
SHARDTUNE_INLINE Float exp_non_positive(const Float& x) {
  const Float result = exp_bounded(x < kLeastExponent ? broadcast(kLeastExponent) : x);
  return x < kLeastExponent ? Float{} : result;
}

SHARDTUNE_INLINE Float sigmoid(const Float& x) {
  const Float small = exp_non_positive(negative_magnitude(x));  // e^-|x| never overflows
  return (x < 0.0F ? small : broadcast(1.0F)) / (small + 1.0F);
}

// Below 5/8 the odd polynomial of Cephes' tanhf, beyond (1 - e^-2|x|) / (1 + e^-2|x|); relative error below 3e-7. NaN
// stays NaN.
SHARDTUNE_INLINE Float tanh(const Float& x) {
  const Float magnitude = x < 0.0F ? -x : x;
  const Float e = exp_non_positive(magnitude * -2.0F);
  const Float far = (1.0F - e) / (1.0F + e), square = x * x;
  Float p = broadcast(-5.70498872745e-3F);
  p = p * square + 2.06390887954e-2F;
  p = p * square - 5.37397155531e-2F;
  p = p * square + 1.33314422036e-1F;
  p = p * square - 3.33332819422e-1F;
  const Float near = x + x * square * p;
  const Float signed_far = x < 0.0F ? -far : far;
  return magnitude < 0.625F ? near : signed_far;
}

template <class F>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq"))) void run_avx512(const F& body) {
  body();
}
template <class F>
__attribute__((target("avx2"))) void run_avx2(const F& body) {
  body();
}

// Runs `body`, a lambda marked SHARDTUNE_VECTOR_BODY, compiled for the chosen instruction set.
template <class F>
void dispatch(const F& body) {
  switch (instruction_set()) {
    case InstructionSet::amx:
    case InstructionSet::avx512_bf16:
    case InstructionSet::avx512: return run_avx512(body);
    case InstructionSet::avx2: return run_avx2(body);
    case InstructionSet::portable: return body();
  }
}

}  // namespace shardtune::simd

#define SHARDTUNE_VECTOR_BODY __attribute__((always_inline))
