#pragma once
// y = x W^T + b, the layout of torch.nn.Linear. x [T, I], weight [O, I] (either dimension dense), bias [O] or
// undefined; all of one dtype. Autograd saves x and the weight (never a copy: the weight's storage may be freed and
// refilled before backward). Products by matrix_product.hpp; where it multiplies bf16 itself the bias is added and its
// gradient summed in fp32. The bits do not depend on the number of threads.
#include <ATen/core/Tensor.h>

namespace shardtune {

at::Tensor apply_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

}  // namespace shardtune
