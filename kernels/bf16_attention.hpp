#pragma once
// Private to kernels/: attention over a packed row in bf16 arithmetic, forward and backward, for segments of any
// length, with dropout or without. Blocks of query rows against all keys they see: softmax over whole rows, no running
// rescaling; backward makes the probabilities again from the log-sum-exp (Dao 2022). One task per (segment, key/value
// head), longest first, so that the number of threads changes no bit. For tensors of takes_bf16_products
// (bf16_gemm.hpp). Legend as in attention.hpp.
//
// Working memory of a thread, n tokens in its longest segment: forward n (6 D + 192) bytes, backward n (16 D + 130),
// with a relative bias n 8 more.
#include <cstdint>

#include <ATen/core/Tensor.h>

#include "kernels/attention.hpp"
#include "kernels/short_attention.hpp"

namespace shardtune {

// q, k, v: dense last dimension. Fills out [T, H, D] contiguous and log_sum_exp [T, H] fp32.
void bf16_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionOptions& options, at::Tensor& out, at::Tensor& log_sum_exp);

// What the forward pass got and made, and the gradient of out, [T, H, D] contiguous.
struct AttentionSaved {
  const at::Tensor &q, &k, &v, &out, &log_sum_exp, &grad;
};
void bf16_attention_backward(const AttentionSaved& saved, const AttentionOptions& options,
                             const AttentionGradients& into);

}  // namespace shardtune
