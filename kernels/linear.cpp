#include "kernels/linear.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/bf16_gemm.hpp"
#include "kernels/matrix_product.hpp"
#include "kernels/side_by_side.hpp"

namespace shardtune {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::int64_t kNoActivation = -1;

// As many weights as outputs; as many biases, or none. Rows of the result: all outputs side by side.
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_any, at::TensorList weights,
                            at::TensorList biases, std::int64_t activation) {
    const at::Tensor x = x_any.contiguous(), weight = side_by_side(weights, 0),
                     bias = biases.empty() ? at::Tensor() : side_by_side(biases, 0);
    ctx->saved_data["weights"] = static_cast<std::int64_t>(weights.size());
    ctx->saved_data["has_bias"] = !biases.empty();
    ctx->saved_data["activation"] = activation;
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    at::Tensor y;
    if (activation == kNoActivation) {
      y = matrix_product(x, weight.t(), bias);
    } else {
      const auto [product, activated] = bf16_gemm_activated(x, weight.t(), bias, static_cast<Activation>(activation));
      saved.push_back(product);
      y = activated;
    }
    ctx->save_for_backward(saved);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const auto num_weights = static_cast<std::size_t>(ctx->saved_data["weights"].toInt());
    const at::TensorList weights = at::TensorList(saved).slice(1, num_weights);
    const at::Tensor& x = saved[0];
    const std::int64_t activation = ctx->saved_data["activation"].toInt();
    at::Tensor grad = grads[0].contiguous();
    if (activation != kNoActivation)
      grad = activation_gradient(saved.back(), grad, static_cast<Activation>(activation));
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    variable_list result(1 + num_weights * (has_bias ? 2 : 1) + 1);
    if (ctx->needs_input_grad(0)) result[0] = matrix_product(grad, side_by_side(weights, 0));
    const auto wants_any = [&](std::size_t first) {
      for (std::size_t i = 0; i < num_weights; ++i)
        if (ctx->needs_input_grad(first + i)) return true;
      return false;
    };
    // The gradient of layer i lies at outputs `at` and further.
    const auto share_out = [&](std::size_t first, const at::Tensor& all) {
      std::int64_t at = 0;
      for (std::size_t i = 0; i < num_weights; at += weights[i].size(0), ++i)
        if (ctx->needs_input_grad(first + i)) result[first + i] = all.narrow(0, at, weights[i].size(0));
    };
    // In the weight's own layout, which for a view of [I, O] is the transposed one.
    if (wants_any(1))
      share_out(1, weights[0].stride(1) == 1 ? matrix_product(grad.t(), x) : matrix_product(x.t(), grad).t());
    if (has_bias && wants_any(1 + num_weights))
      share_out(1 + num_weights, takes_bf16_products(grad) ? bf16_column_sums(grad) : grad.sum(0));
    return result;
  }
};

at::Tensor apply(const at::Tensor& x, const std::vector<LinearOperands>& layers, std::int64_t activation) {
  std::vector<at::Tensor> weights, biases;
  for (const auto& [weight, bias] : layers) {
    weights.push_back(weight);
    if (bias.defined()) biases.push_back(bias);
  }
  check_internal(biases.empty() || biases.size() == weights.size(),
                 "either all layers of a product have a bias or none");
  return Linear::apply(x, at::TensorList(weights), at::TensorList(biases), activation);
}

}  // namespace

at::Tensor apply_linear(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias) {
  return apply(x, {{weight, bias}}, kNoActivation);
}

at::Tensor apply_linears(const at::Tensor& x, const std::vector<LinearOperands>& layers) {
  return apply(x, layers, kNoActivation);
}

at::Tensor apply_activated_linear(const at::Tensor& x, const LinearOperands& layer, Activation activation) {
  if (takes_bf16_products(x) && find_block_activation(activation) != nullptr)
    return apply(x, {layer}, static_cast<std::int64_t>(activation));
  return activate(apply_linear(x, layer.weight, layer.bias), activation);
}

}  // namespace shardtune
