#pragma once
// One AdamW step over flat fp32 slices (Loshchilov and Hutter, "Decoupled Weight Decay Regularization", ICLR 2019).
// Element by element the arithmetic of torch.optim.AdamW (single tensor, not fused, amsgrad and maximize off), each
// operation rounded to fp32:
//   p *= 1 - lr * weight_decay;  m += (1 - beta1) * (g - m);  v = beta2 * v + (1 - beta2) * g * g;
//   p -= (lr / (1 - beta1^t)) * m / (sqrt(v) / sqrt(1 - beta2^t) + eps)
// No contraction and no reassociation: the result does not depend on how tensors are cut, on alignment, on the number
// of threads or on the instruction set.
// Moments may be bf16: computed in fp32 and rounded when stored, m to nearest, v stochastically (up with the
// probability of the fraction that is lost). To nearest v would never fall: with beta2 = 0.999 its steps down are
// smaller than half of the distance to the next bf16 value.
#include <cstdint>

#include <ATen/core/Tensor.h>

namespace shardtune {

struct AdamWOptions {
  double lr = 1e-3;
  double beta1 = 0.9;
  double beta2 = 0.999;
  double eps = 1e-8;
  double weight_decay = 0.0;  // 0 for the group without decay
  std::int64_t step = 1;      // t, from 1: the number of this update
  // bf16 moments only: names the parameter. The rounding of an element is a function of (key, its index, t).
  std::uint64_t rounding_key = 0;
  double grad_scale = 1.0;  // g = grad * grad_scale (the clip factor), rounded to fp32; grad is not written
};

// 1-d contiguous CPU tensors of equal size, possibly empty; fp32, exp_avg and exp_avg_sq both fp32 or both bf16. param,
// exp_avg, exp_avg_sq are updated in place through raw memory (no version counters). One pass: everything is read and
// written once. Thread-safe for disjoint tensors. Error{internal} for tensors that do not fit.
struct AdamWSlice {
  at::Tensor param;
  at::Tensor exp_avg;
  at::Tensor exp_avg_sq;
  at::Tensor grad;
  std::int64_t offset = 0;  // index of the first element in the parameter, for the rounding of bf16 moments
  at::Tensor rounded = {};  // bf16 or fp16: becomes the new param rounded to nearest even; or undefined
};
void adamw_step(const AdamWSlice& slice, const AdamWOptions& options);

}  // namespace shardtune
