#pragma once
// y = x W^T + b, the layout of torch.nn.Linear. x [T, I], weight [O, I], bias [O] or undefined; all of one dtype. A
// weight's gradient has the dtype that its leaf asks for (set_grad_dtype) and the numbers that its own would hold.
// Autograd saves x and the weights (never a copy: the weights' storage may be freed and refilled before backward).
// Products by matrix_product.hpp; where it multiplies bf16 itself the bias is added and its gradient summed in fp32.
// The bits do not depend on the number of threads.
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/activation.hpp"

namespace shardtune {

at::Tensor apply_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias = {});

struct LinearOperands {
  at::Tensor weight;
  at::Tensor bias = {};
  bool is_transposed = false;  // weight [I, O], as GPT-2's Conv1D has it, and its gradient with it; one layer alone
};
// Several layers of the same x, all with a bias or all without, weights [O_i, I] dense in I, as one product each way ->
// [T, sum of O_i], the results side by side (see split_columns). The gradient of x is one sum over all outputs; those
// of the weights are views of one tensor, so none of it is freed before the last of them, except where a layer is
// frozen. Where parts of a product must be put together first (matrix_product.hpp), weights are copied for its time.
at::Tensor apply_linears(const at::Tensor& x, const std::vector<LinearOperands>& layers);

// activate(apply_linear(x, weight, bias), activation), the same bits. gelu_tanh of bf16 is applied while the
// product is stored. Saves the product, too.
at::Tensor apply_activated_linear(const at::Tensor& x, const LinearOperands& layer, Activation activation);

}  // namespace shardtune
