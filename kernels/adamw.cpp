#include "kernels/adamw.hpp"

#include <bit>
#include <cmath>
#include <cstdint>

#include <ATen/Parallel.h>

#include "core/error.hpp"
#include "core/rng.hpp"
#include "kernels/flat_slice.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

struct Factors {  // of one step, rounded to fp32 as ATen rounds its scalars
  float decay;
  float one_minus_beta1;
  float beta1_residual;  // 1 - (1 - beta1) in fp32, for the branch of lerp below
  float beta2;
  float one_minus_beta2;
  float minus_step_size;
  float sqrt_correction2;
  float eps;
  float grad_scale;
  std::uint32_t rounding;  // of (key, step)
};

template <class Moment>
struct Pointers {
  float* __restrict param;
  Moment* __restrict exp_avg;
  Moment* __restrict exp_avg_sq;
  const float* __restrict grad;
  std::uint32_t first_index;
};

// Moments in memory: float, or the upper half of one.
using Half = std::uint16_t;

[[gnu::always_inline]] inline float load(float value) { return value; }
[[gnu::always_inline]] inline float load(Half value) { return std::bit_cast<float>(std::uint32_t{value} << 16); }

// Adds less than one unit of the upper half and cuts. Infinity and NaN pass unchanged (or as infinity).
[[gnu::always_inline]] inline Half upper_half(float value, std::uint32_t addend) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const bool is_finite = (bits & 0x7F800000U) != 0x7F800000U;
  return static_cast<Half>((is_finite ? bits + addend : bits) >> 16);
}
[[gnu::always_inline]] inline void store_nearest(float* to, float value) { *to = value; }
[[gnu::always_inline]] inline void store_nearest(Half* to, float value) {
  *to = upper_half(value, 0x7FFFU + ((std::bit_cast<std::uint32_t>(value) >> 16) & 1U));
}
[[gnu::always_inline]] inline void store_random(float* to, float value, std::uint32_t /*index*/,
                                                std::uint32_t /*key*/) {
  *to = value;
}
// The finalizer of MurmurHash3 (Appleby) as a counter-based generator.
[[gnu::always_inline]] inline void store_random(Half* to, float value, std::uint32_t index, std::uint32_t key) {
  std::uint32_t h = index * 0x9E3779B9U + key;
  h = (h ^ (h >> 16)) * 0x85EBCA6BU;
  h = (h ^ (h >> 13)) * 0xC2B2AE35U;
  *to = upper_half(value, h >> 16);
}

Factors make_factors(const AdamWOptions& o) {
  const auto t = static_cast<double>(o.step);
  const double correction1 = 1.0 - std::pow(o.beta1, t);
  const double correction2 = 1.0 - std::pow(o.beta2, t);
  Factors f{};
  f.decay = static_cast<float>(1.0 - o.lr * o.weight_decay);
  f.one_minus_beta1 = static_cast<float>(1.0 - o.beta1);
  f.beta1_residual = 1.0F - f.one_minus_beta1;
  f.beta2 = static_cast<float>(o.beta2);
  f.one_minus_beta2 = static_cast<float>(1.0 - o.beta2);
  f.minus_step_size = static_cast<float>(-(o.lr / correction1));
  f.sqrt_correction2 = static_cast<float>(std::sqrt(correction2));
  f.eps = static_cast<float>(o.eps);
  f.grad_scale = static_cast<float>(o.grad_scale);
  f.rounding = static_cast<std::uint32_t>(mix_key(o.rounding_key, static_cast<std::uint64_t>(o.step)));
  return f;
}

// kSmallWeight: ATen's lerp takes start + w * (end - start) for |w| < 0.5, else end - (end - start) * (1 - w).
template <bool kSmallWeight, class Moment>
[[gnu::always_inline]] inline void update(const Pointers<Moment>& p, std::int64_t begin, std::int64_t end,
                                          const Factors& f) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float g = p.grad[i] * f.grad_scale;
    const float m = load(p.exp_avg[i]);
    const float difference = g - m;
    const float new_m = kSmallWeight ? m + f.one_minus_beta1 * difference : g - difference * f.beta1_residual;
    const float new_v = load(p.exp_avg_sq[i]) * f.beta2 + f.one_minus_beta2 * g * g;
    const float denominator = std::sqrt(new_v) / f.sqrt_correction2 + f.eps;
    store_nearest(p.exp_avg + i, new_m);
    store_random(p.exp_avg_sq + i, new_v, p.first_index + static_cast<std::uint32_t>(i), f.rounding);
    p.param[i] = p.param[i] * f.decay + f.minus_step_size * new_m / denominator;
  }
}

constexpr const char* kRequirement =
    "adamw_step: needs 1-d contiguous CPU tensors of equal size, fp32, (moments, copy) bf16 or (copy) fp16";

void* checked_data(const at::Tensor& tensor, std::int64_t numel, at::ScalarType dtype) {
  return flat_data(tensor, numel, dtype, kRequirement);
}

template <class Moment>
void run_step(const AdamWSlice& slice, const Factors& factors, at::ScalarType moment_dtype) {
  const std::int64_t numel = slice.param.numel();
  const Pointers<Moment> pointers{static_cast<float*>(checked_data(slice.param, numel, at::kFloat)),
                                  static_cast<Moment*>(checked_data(slice.exp_avg, numel, moment_dtype)),
                                  static_cast<Moment*>(checked_data(slice.exp_avg_sq, numel, moment_dtype)),
                                  static_cast<const float*>(checked_data(slice.grad, numel, at::kFloat)),
                                  static_cast<std::uint32_t>(slice.offset)};
  const RoundedCopy rounded(slice.rounded, numel, kRequirement);
  const bool has_small_weight = factors.one_minus_beta1 < 0.5F;
  constexpr std::int64_t kGrain = 1 << 15;
  at::parallel_for(0, numel, kGrain, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      rounded.run(pointers.param, begin, end, [&](std::int64_t from, std::int64_t to) SHARDTUNE_VECTOR_BODY {
        if (has_small_weight) {
          update<true>(pointers, from, to, factors);
        } else {
          update<false>(pointers, from, to, factors);
        }
      });
    });
  });
}

}  // namespace

void adamw_step(const AdamWSlice& slice, const AdamWOptions& options) {
  check_internal(options.step >= 1, "adamw_step: steps count from 1");
  const Factors factors = make_factors(options);
  if (slice.exp_avg.scalar_type() == at::kBFloat16) {
    run_step<Half>(slice, factors, at::kBFloat16);
  } else {
    run_step<float>(slice, factors, at::kFloat);
  }
}

}  // namespace shardtune
