#pragma once
// y = x W^T + b, the layout of torch.nn.Linear. x [T, I], weight [O, I] (either dimension dense), bias [O] or
// undefined; all of one dtype. Autograd saves x and the weight (never a copy: the weight's storage may be freed and
// refilled before backward). bf16 where the processor has bf16 products: own kernels (bf16_gemm.hpp), the bias added
// and its gradient summed in fp32, the same bits for any number of threads. Elsewhere ATen's matrix products:
// repeatable, but their bits may depend on the number of threads.
#include <ATen/core/Tensor.h>

namespace shardtune {

at::Tensor apply_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

}  // namespace shardtune
