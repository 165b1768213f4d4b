#pragma once
// activation(gate) * up, the middle of Llama's MLP. gate, up [T, F], fp32, bf16 or fp16.
#include <ATen/core/Tensor.h>

namespace shardtune {

// silu(gate) * up (SwiGLU, Shazeer 2020), computed in fp32 and rounded once. Saves gate and up only.
at::Tensor silu_and_mul(const at::Tensor& gate, const at::Tensor& up);
at::Tensor silu_and_mul_reference(const at::Tensor& gate, const at::Tensor& up);

}  // namespace shardtune
