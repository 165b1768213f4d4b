#include "kernels/adamw.hpp"

#include <cmath>
#include <cstdint>

#include <ATen/Parallel.h>

#include "core/error.hpp"
#include "kernels/instruction_set.hpp"

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
};

struct Pointers {
  float* __restrict param;
  float* __restrict exp_avg;
  float* __restrict exp_avg_sq;
  const float* __restrict grad;
};

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
  return f;
}

// kSmallWeight: ATen's lerp takes start + w * (end - start) for |w| < 0.5, else end - (end - start) * (1 - w).
template <bool kSmallWeight>
[[gnu::always_inline]] inline void update(const Pointers& p, std::int64_t begin, std::int64_t end, const Factors& f) {
  for (std::int64_t i = begin; i < end; ++i) {
    const float g = p.grad[i] * f.grad_scale;
    const float m = p.exp_avg[i];
    const float difference = g - m;
    const float new_m = kSmallWeight ? m + f.one_minus_beta1 * difference : g - difference * f.beta1_residual;
    const float new_v = p.exp_avg_sq[i] * f.beta2 + f.one_minus_beta2 * g * g;
    const float denominator = std::sqrt(new_v) / f.sqrt_correction2 + f.eps;
    p.exp_avg[i] = new_m;
    p.exp_avg_sq[i] = new_v;
    p.param[i] = p.param[i] * f.decay + f.minus_step_size * new_m / denominator;
  }
}

// Wider registers only: without contraction every instruction set gives the same bits (tested).
template <bool kSmallWeight>
void update_baseline(const Pointers& p, std::int64_t begin, std::int64_t end, const Factors& f) {
  update<kSmallWeight>(p, begin, end, f);
}

#if defined(__x86_64__)
template <bool kSmallWeight>
__attribute__((target("avx2"))) void update_avx2(const Pointers& p, std::int64_t begin, std::int64_t end,
                                                 const Factors& f) {
  update<kSmallWeight>(p, begin, end, f);
}
#endif

using Update = void (*)(const Pointers&, std::int64_t, std::int64_t, const Factors&);

Update choose_update(bool small_weight) {
#if defined(__x86_64__)
  if (instruction_set() >= InstructionSet::avx2) return small_weight ? update_avx2<true> : update_avx2<false>;
#endif
  return small_weight ? update_baseline<true> : update_baseline<false>;
}

float* checked_data(const at::Tensor& tensor, std::int64_t numel) {
  check_internal(tensor.defined() && tensor.scalar_type() == at::kFloat && tensor.is_contiguous() &&
                     tensor.dim() == 1 && tensor.numel() == numel && tensor.is_cpu(),
                 "adamw_step: needs 1-d contiguous fp32 CPU tensors of equal size");
  return static_cast<float*>(tensor.data_ptr());
}

}  // namespace

void adamw_step(const AdamWSlice& slice, const AdamWOptions& options) {
  check_internal(options.step >= 1, "adamw_step: steps count from 1");
  const std::int64_t numel = slice.param.numel();
  const Pointers pointers{checked_data(slice.param, numel), checked_data(slice.exp_avg, numel),
                          checked_data(slice.exp_avg_sq, numel), checked_data(slice.grad, numel)};
  const Factors factors = make_factors(options);
  const Update run = choose_update(factors.one_minus_beta1 < 0.5F);
  constexpr std::int64_t kGrain = 1 << 15;
  at::parallel_for(0, numel, kGrain, [&](std::int64_t begin, std::int64_t end) { run(pointers, begin, end, factors); });
}

}  // namespace shardtune
