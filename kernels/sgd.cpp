#include "kernels/sgd.hpp"

#include <cstdint>

#include <ATen/Parallel.h>

#include "core/error.hpp"
#include "kernels/flat_slice.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

struct Factors {  // rounded to fp32 as ATen rounds its scalars
  float minus_lr;
  float momentum;
  float weight_decay;
  float grad_scale;
};

struct Pointers {
  float* param;
  float* buffer;  // not looked at without momentum
  const float* grad;
};

enum class Kind { plain, momentum, nesterov };

template <Kind kKind, bool kDecays>
[[gnu::always_inline]] inline void update(Pointers p, std::int64_t begin, std::int64_t end, Factors f) {
  // By value: what a reference names might change with every store, for all the compiler knows, and ends vectorisation.
  float* __restrict const param = p.param;
  float* __restrict const buffer = p.buffer;
  const float* __restrict const grad = p.grad;
#pragma GCC ivdep
  for (std::int64_t i = begin; i < end; ++i) {
    const float before = param[i];
    float g = grad[i] * f.grad_scale;
    if constexpr (kDecays) g = g + f.weight_decay * before;  // 0 * infinity would be NaN
    if constexpr (kKind != Kind::plain) {
      const float b = buffer[i] * f.momentum + g;
      buffer[i] = b;
      g = kKind == Kind::nesterov ? g + f.momentum * b : b;
    }
    param[i] = before + f.minus_lr * g;
  }
}

template <Kind kKind>
void run_step(const Pointers& pointers, const RoundedCopy& rounded, std::int64_t numel, const Factors& factors) {
  constexpr std::int64_t kGrain = 1 << 15;
  at::parallel_for(0, numel, kGrain, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      rounded.run(pointers.param, begin, end, [&](std::int64_t from, std::int64_t to) SHARDTUNE_VECTOR_BODY {
        if (factors.weight_decay != 0.0F) {
          update<kKind, true>(pointers, from, to, factors);
        } else {
          update<kKind, false>(pointers, from, to, factors);
        }
      });
    });
  });
}

constexpr const char* kRequirement =
    "sgd_step: needs 1-d contiguous CPU tensors of equal size, fp32 or (copy) bf16 or fp16";

float* checked_data(const at::Tensor& tensor, std::int64_t numel) {
  return static_cast<float*>(flat_data(tensor, numel, at::kFloat, kRequirement));
}

}  // namespace

void sgd_step(const SgdSlice& slice, const SgdOptions& options) {
  const bool has_momentum = options.momentum != 0.0;
  check_internal(has_momentum || !options.nesterov, "sgd_step: nesterov needs momentum");
  check_internal(has_momentum == slice.momentum_buffer.defined(), "sgd_step: momentum and its buffer go together");
  const std::int64_t numel = slice.param.numel();
  const Pointers pointers{checked_data(slice.param, numel),
                          has_momentum ? checked_data(slice.momentum_buffer, numel) : nullptr,
                          checked_data(slice.grad, numel)};
  const RoundedCopy rounded(slice.rounded, numel, kRequirement);
  const Factors factors{.minus_lr = static_cast<float>(-options.lr),
                        .momentum = static_cast<float>(options.momentum),
                        .weight_decay = static_cast<float>(options.weight_decay),
                        .grad_scale = static_cast<float>(options.grad_scale)};
  if (options.nesterov) return run_step<Kind::nesterov>(pointers, rounded, numel, factors);
  if (has_momentum) return run_step<Kind::momentum>(pointers, rounded, numel, factors);
  run_step<Kind::plain>(pointers, rounded, numel, factors);
}

}  // namespace shardtune
