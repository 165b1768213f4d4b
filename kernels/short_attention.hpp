#pragma once
// Private to kernels/: attention of segments that fit a core's cache, forward and backward, fp32, bf16 or fp16 in and
// out, fp32 inside. One task per (segment, key/value head), so nothing is shared between threads and their number
// changes no bit; with dropout or without it is the same pass. Legend as in attention.hpp.
#include <cstdint>

#include <ATen/core/Tensor.h>

#include "kernels/attention.hpp"

namespace shardtune {

// The row of the dropout mask of (token of the packed row, query head); see varlen_attention.
inline std::uint64_t dropout_row_of(std::int64_t token, std::int64_t head) {
  return (static_cast<std::uint64_t>(token) << 16) | static_cast<std::uint64_t>(head);
}

// Longest segment these functions take; longer ones they leave alone.
inline constexpr std::int64_t kShortSegment = 256;

// q, k, v: dense last dimension. Fills rows of out [T, H, D] contiguous and log_sum_exp [T, H] fp32 of all short
// segments.
void short_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const AttentionOptions& options, at::Tensor& out, at::Tensor& log_sum_exp);

struct AttentionGradients {
  at::Tensor &q, &k, &v;                // dense last dimension, dtype of the inputs
  at::Tensor* diagonal_sums = nullptr;  // see attention_hooks.hpp; null without a relative bias
};
// grad [T, H, D] contiguous. Fills rows of all short segments.
void short_attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& log_sum_exp, const AttentionOptions& options,
                              const AttentionGradients& into);

}  // namespace shardtune
