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
  double scale = 1.0;   // multiplies the scores; usually 1 / sqrt(D)
  DropoutSite dropout;  // on the probabilities
  // Where the result is kept for recomputation, and taken from; null: it is computed again.
  std::shared_ptr<RecomputeContext> recompute = nullptr;
};

// q [T, H, D], k and v [T, K, D], fp32, bf16 or fp16, any strides with a dense last dimension; result [T, H, D]
// contiguous. bf16 on a processor with bf16 products: own kernel for every length (bf16_attention.hpp), which rounds
// probabilities and gradients of scores to bf16 as flash attention does. Otherwise segments of at most 256 tokens: own
// kernel in fp32 (short_attention.hpp); longer ones: without dropout flash attention (Dao 2022) as ATen implements it for
// CPUs; with dropout softmax in fp32 over blocks of query rows, made again in backward. Saves q, k, v, one fp32 number per
// (token, head), and for flash attention and bf16 the output. The mask of (token t of the row, head h, key j of the
// segment) is element j of row t * 2^16 + h (see dropout.hpp). The bits do not depend on the number of threads for bf16
// products and short segments; for longer ones, where the matrix products are ATen's, they may.
at::Tensor varlen_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionOptions& options);
// Any floating dtype; computed in that dtype by plain operations, differentiable by autograd.
at::Tensor varlen_attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const AttentionOptions& options);

}  // namespace shardtune
