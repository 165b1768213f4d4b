#pragma once
// Rows of a table. ids [T] int64, weight [V, D] fp32, bf16 or fp16, result [T, D] of the weight's dtype.
// Backward adds the rows of the incoming gradient in the order of the tokens, in fp32, so the bits do not depend on the
// number of threads; it allocates the fp32 gradient [V, D] and nothing else.
// An id outside [0, V) is Error{data} naming the position and both numbers.
#include <cstdint>
#include <memory>

#include <ATen/core/Tensor.h>

namespace shardtune {

// When the output head uses the same weight, its backward pass (which runs first) leaves its gradient here instead of
// handing it to autograd, and the embedding adds its rows to it: one [V, D] buffer instead of three.
// One object per forward pass; used by one thread at a time.
struct TiedGradient {
  at::Tensor weight_grad;  // [V, D] fp32 between the two backward calls, else undefined
};

// zero_row: a row that gets no gradient (torch's padding_idx), -1 = none.
at::Tensor embedding_lookup(const at::Tensor& ids, const at::Tensor& weight, std::int64_t zero_row = -1,
                            std::shared_ptr<TiedGradient> tied = nullptr);
at::Tensor embedding_reference(const at::Tensor& ids, const at::Tensor& weight, std::int64_t zero_row = -1);

}  // namespace shardtune
