#pragma once
// Scaled dot-product attention over a packed row: every segment attends to itself only, and no T x T tensor exists.
// Legend: T tokens of the row, H query heads, K key/value heads (H a multiple of K: grouped queries), D head size.
#include <cstdint>
#include <memory>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/dropout.hpp"
#include "kernels/recompute_context.hpp"

namespace shardtune {

struct AttentionOptions {
  // S + 1 entries, first 0, last T, strictly increasing. Shared: a recomputed forward pass uses it again.
  std::shared_ptr<const std::vector<std::int64_t>> segment_offsets;
  bool is_causal = false;
  double scale = 1.0;  // multiplies the scores; positive, usually 1 / sqrt(D)
  // How far a query sees, 0 = through all of its segment. Causal: the last `window` keys, its own among them (key j of
  // query i where i - j < window); otherwise keys where |i - j| <= window. Both bounds are those of transformers'
  // sliding_window. Work grows with T * window, not with T^2.
  std::int64_t window = 0;
  // Scaled scores s become soft_cap * tanh(s / soft_cap) (Gemma 2); 0 = they stay.
  double soft_cap = 0;
  // Added to the scores after scale and cap, by distance: [H, 2 L - 1] fp32 contiguous in its last dimension, entry
  // j - i + L - 1 of a query's head for key j of query i; L at least the longest segment (T5's buckets spread over
  // distances, ALiBi). Differentiable: the gradient is the sum over each diagonal, in fp32 and a fixed order. Undefined
  // = none.
  at::Tensor relative_bias = {};
  DropoutSite dropout;  // on the probabilities
  // Where the result is kept for recomputation, and taken from; null: it is computed again.
  std::shared_ptr<RecomputeContext> recompute = nullptr;
};

// q [T, H, D], k and v [T, K, D], fp32, bf16 or fp16, any strides with a dense last dimension; result [T, H, D]
// contiguous. bf16 on a processor with bf16 products: own kernel for every length (bf16_attention.hpp), which rounds
// probabilities and gradients of scores to bf16 as flash attention does. Otherwise segments of at most 256 tokens: own
// kernel in fp32 (short_attention.hpp); longer ones: without dropout, cap, bias or a window that hides keys flash
// attention (Dao 2022) as ATen implements it for CPUs; with any of them blocks of query rows (blocked_attention.hpp).
// Saves q, k, v, the bias, one fp32 number per (token, head), and for flash attention and bf16 the output.
// Error{internal} for shapes, window, cap or bias that break the contract. The dropout mask of (token t of the row,
// head h, key j of the segment) is element j of row t * 2^16 + h (see dropout.hpp). The bits do not depend on the
// number of threads; those of flash attention are ATen's and MKL's affair, on processors that are not Intel's they do
// not either.
at::Tensor varlen_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionOptions& options);
// Any floating dtype; computed in that dtype by plain operations, differentiable by autograd.
at::Tensor varlen_attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const AttentionOptions& options);

}  // namespace shardtune
