#pragma once
// Cross-entropy losses as SUMS times a factor. Labels are int64; kIgnoredLabel is not counted. A label outside [0, C)
// that is not kIgnoredLabel is Error{data}. All sums in fp32 or better.
// label_smoothing, a share e from 0 to 1 (Szegedy et al. 2016): the target is 1 - e at the label plus e / C everywhere;
// a loss is (1 - e) * -log p[label] + e * mean of -log p over all classes, its gradient p - (1 - e) onehot - e / C, as
// transformers' LabelSmoother and torch's label_smoothing have it. 0 = the plain loss, with the bits it has without it.
// Legend: T tokens, D hidden size, V vocabulary, S examples, C classes.
#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>

#include "kernels/embedding.hpp"

namespace shardtune {

inline constexpr std::int64_t kIgnoredLabel = -100;

// Classification: logits [S, C] fp32, labels [S]. Result: fp32 scalar, loss_scale * sum of the losses.
at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels, double loss_scale,
                             double label_smoothing = 0.0);

struct HeadOptions {
  double loss_scale = 1.0;
  double label_smoothing = 0.0;
  std::int64_t chunk_rows = 0;  // 0 = chosen from V and dtype alone (about 128 MiB of logits a chunk, 1024 rows at most)
  std::shared_ptr<TiedGradient> tied = nullptr;  // see embedding.hpp; set when weight is also the embedding table
};

// Language-model head and loss in one: logits = hidden weight^T, loss_scale * sum of the losses of the labelled rows.
// hidden [T, D], weight [V, D] fp32, bf16 or fp16, labels [T]. Only labelled rows are multiplied, chunk by chunk; the
// [T, V] logits never exist. The gradients are made in the forward pass (recipe: Liger kernel's fused linear
// cross-entropy, Hsu et al. 2024) and are all that is saved: d hidden [T, D] and d weight [V, D] in fp32. Without
// gradient mode, or where neither input wants one, only the loss is computed. In bf16 logits are rounded to bf16, as in
// transformers; the products that make d weight are rounded to bf16 only where the processor has no bf16 products
// (matrix_product.hpp). The bits do not depend on the number of threads.
at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
                                    const HeadOptions& options);
at::Tensor linear_cross_entropy_sum_reference(const at::Tensor& hidden, const at::Tensor& weight,
                                              const at::Tensor& labels, double loss_scale,
                                              double label_smoothing = 0.0);

}  // namespace shardtune
