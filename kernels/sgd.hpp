#pragma once
// One step of stochastic gradient descent with momentum over flat fp32 slices (Sutskever et al., "On the importance of
// initialization and momentum in deep learning", ICML 2013, in the form of torch.optim.SGD). Element by element the
// arithmetic of torch.optim.SGD (single tensor, not fused; dampening 0, maximize off), each operation rounded to fp32:
//   g += weight_decay * p;  b = momentum * b + g;  g = nesterov ? g + momentum * b : b;  p -= lr * g
// torch starts b with the first g; a b of zeros gives the same. No contraction and no reassociation: the result does
// not depend on how tensors are cut, on alignment, on the number of threads or on the instruction set.
#include <ATen/core/Tensor.h>

namespace shardtune {

struct SgdOptions {
  double lr = 1e-3;
  double momentum = 0.0;
  double weight_decay = 0.0;  // 0 for the group without decay
  bool nesterov = false;      // needs momentum
  double grad_scale = 1.0;    // g = grad * grad_scale (the clip factor), rounded to fp32; grad is not written
};

// 1-d contiguous fp32 CPU tensors of equal size, possibly empty. param and momentum_buffer are updated in place through
// raw memory (no version counters), in one pass. momentum_buffer is undefined exactly where momentum is 0. Thread-safe for disjoint
// tensors. Error{internal} for tensors that do not fit.
struct SgdSlice {
  at::Tensor param;
  at::Tensor momentum_buffer;
  at::Tensor grad;
  at::Tensor rounded = {};  // bf16 or fp16: becomes the new param rounded to nearest even; or undefined
};
void sgd_step(const SgdSlice& slice, const SgdOptions& options);

}  // namespace shardtune
