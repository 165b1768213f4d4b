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
std::vector<at::Tensor> split_columns(const at::Tensor& x, std::vector<std::int64_t> sizes);

}  // namespace shardtune
