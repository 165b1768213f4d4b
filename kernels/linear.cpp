#include "kernels/linear.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/bf16_gemm.hpp"
#include "kernels/matrix_product.hpp"

namespace shardtune {
namespace {

// bias: the weight once more where there is none (a Function takes no undefined tensor).
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_any, const at::Tensor& weight,
                            const at::Tensor& bias, bool has_bias) {
    const at::Tensor x = x_any.contiguous();
    ctx->save_for_backward({x, weight});
    ctx->saved_data["has_bias"] = has_bias;
    return matrix_product(x, weight.t(), has_bias ? bias : at::Tensor());
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &weight = saved[1], grad = grads[0].contiguous();
    torch::autograd::variable_list result(4);
    if (ctx->needs_input_grad(0)) result[0] = matrix_product(grad, weight);
    // In the weight's own layout, which for a view of [I, O] is the transposed one.
    if (ctx->needs_input_grad(1))
      result[1] = weight.stride(1) == 1 ? matrix_product(grad.t(), x) : matrix_product(x.t(), grad).t();
    if (ctx->saved_data["has_bias"].toBool() && ctx->needs_input_grad(2))
      result[2] = takes_bf16_products(grad) ? bf16_column_sums(grad) : grad.sum(0);
    return result;
  }
};

}  // namespace

at::Tensor apply_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return Linear::apply(x, weight, bias.defined() ? bias : weight, bias.defined());
}

}  // namespace shardtune
