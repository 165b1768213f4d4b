#pragma once
// Private to kernels/: attention of long segments by matrix_product.hpp on blocks of query rows, softmax in fp32
// over whole rows, made again in backward: for what ATen's flash attention lacks. The matrix products of a block cost
// O(rows x keys in reach). Working memory: a few tensors of 8 MiB (of one row where that is more), whatever the length,
// and for 16-bit numbers the keys and values of a head in fp32. Legend as in attention.hpp.
#include <cstdint>

#include <ATen/core/Tensor.h>

#include "kernels/attention.hpp"
#include "kernels/short_attention.hpp"

namespace shardtune {

// Whether these functions take a segment of `length` tokens; others they leave alone.
bool takes_blocks(const AttentionOptions& options, std::int64_t length);

// q, k, v: dense last dimension. Fills rows of out [T, H, D].
void blocked_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionOptions& options, at::Tensor& out);
// grad [T, H, D]. Fills rows of `into`, those of d_k and d_v that belong to other segments with zeros.
void blocked_attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const AttentionOptions& options, const AttentionGradients& into);

}  // namespace shardtune
