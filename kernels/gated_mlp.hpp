#pragma once
// activation(gate) * up, the middle of Llama's MLP.
#include <ATen/core/Tensor.h>

namespace shardtune {

// gate_up [T, 2 F], gate in the first F columns, fp32, bf16 or fp16 -> silu(gate) * up [T, F] (SwiGLU, Shazeer 2020),
// computed in fp32 and rounded once. Saves gate_up only.
at::Tensor silu_and_mul(const at::Tensor& gate_up);
at::Tensor silu_and_mul_reference(const at::Tensor& gate_up);

}  // namespace shardtune
