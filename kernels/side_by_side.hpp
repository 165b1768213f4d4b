#pragma once
// Several matrices as one. Operators that write the parts of a result (gradients of query, key and
// value) side by side save the copy that brings them together.
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace shardtune {

// at::cat of matrices [M, N_i] along dim 1; a view where they lie in memory as if they had been cut from one dense
// matrix, in this order.
at::Tensor side_by_side(at::TensorList parts);

// Views [M, sizes[i]] of x [M, sum of sizes], differentiable; the gradients are put together by side_by_side().
// Autograd does not know that they are views: nobody writes into them or into x.
std::vector<at::Tensor> split_columns(const at::Tensor& x, std::vector<std::int64_t> sizes);
// The same as heads of one size: views [M, heads[i], K] of dense rows x [M, sum of heads x K].
std::vector<at::Tensor> split_heads(const at::Tensor& x, std::vector<std::int64_t> heads);

}  // namespace shardtune
