#pragma once
// Normalisation of the last dimension. x [T, D], weight and bias [D]; fp32, bf16 or fp16, all of one dtype. Statistics
// and sums are taken in fp32 or better, those of weight and bias gradients too (ATen's CPU layer norm sums them in
// bf16). The bits do not depend on the number of threads. Each saves x, the weight (a reference) and one or two fp32
// numbers per row.
#include <ATen/core/Tensor.h>

#include "kernels/dropout.hpp"

namespace shardtune {

// (x - mean) / sqrt(variance + eps) * weight + bias (Ba et al. 2016), variance with divisor D.
at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps);
at::Tensor layer_norm_reference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps);

// x / sqrt(mean(x^2) + eps) * weight (Zhang and Sennrich 2019). As transformers' LlamaRMSNorm, except that in bf16 the
// normalised value is not rounded before it is multiplied by the weight.
at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps);
at::Tensor rms_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps);

// The place where the output of a sublayer joins the residual stream: residual + dropout(branch), both [T, D].
struct ResidualAdd {
  at::Tensor residual, branch;
  DropoutSite dropout = {};
};
struct NormedSum {
  at::Tensor normed, sum;  // architectures that normalise after the sublayer take the first only; the second is free
};
// The sum and its norm in one pass over the rows, and one backward: bit for bit what the norm of `residual +
// dropout(branch, site)` gives. So what dropout keeps and the sum are rounded to the dtype before the next operation,
// as in Hugging Face; backward the norm's gradient is rounded, added to that of the sum, rounded, then dropped for the
// branch. Saves the sum in place of x, nothing more.
NormedSum add_layer_norm(const ResidualAdd& add, const at::Tensor& weight, const at::Tensor& bias, double eps);
NormedSum add_rms_norm(const ResidualAdd& add, const at::Tensor& weight, double eps);

}  // namespace shardtune
