#pragma once
// y = x W^T + b, the layout of torch.nn.Linear. x [T, I], weight [O, I], bias [O] or undefined; all of one dtype.
// Autograd saves x and a view of weight (never a copy: the weight's storage may be freed and refilled before backward).
// The matrix products are ATen's: repeatable, but their bits may depend on the number of threads.
#include <ATen/core/Tensor.h>

namespace shardtune {

at::Tensor apply_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

}  // namespace shardtune
