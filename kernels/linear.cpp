#include "kernels/linear.hpp"

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/bf16_gemm.hpp"
#include "kernels/matrix_product.hpp"

namespace shardtune {
namespace {

using torch::autograd::AutogradContext;
using torch::autograd::variable_list;

constexpr std::int64_t kNoActivation = -1;

// As many weights as outputs; as many biases, or none. Rows of the result: all outputs side by side.
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_any, at::TensorList weights,
                            at::TensorList biases, std::int64_t activation) {
    const at::Tensor x = x_any.contiguous();
    const at::Tensor bias = biases.empty() ? at::Tensor() : biases.size() == 1 ? biases[0] : at::cat(biases);
    ctx->saved_data["weights"] = static_cast<std::int64_t>(weights.size());
    ctx->saved_data["has_bias"] = !biases.empty();
    ctx->saved_data["activation"] = activation;
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    at::Tensor y;
    if (activation == kNoActivation) {
      std::vector<at::Tensor> transposed;
      for (const at::Tensor& weight : weights) transposed.push_back(weight.t());
      y = matrix_product(x, transposed, 1, bias);
    } else {
      const auto [product, activated] =
          bf16_gemm_activated(x, weights[0].t(), bias, static_cast<Activation>(activation));
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
    if (ctx->needs_input_grad(0)) result[0] = matrix_product(grad, weights, 0, {});
    // A gradient of all layers at once, shared out; where some are frozen, one by one of the others.
    const auto fill = [&](std::size_t first, const auto& of) {
      std::size_t num_wanted = 0;
      for (std::size_t i = 0; i < num_weights; ++i) num_wanted += ctx->needs_input_grad(first + i) ? 1 : 0;
      if (num_wanted == 0) return;
      const at::Tensor all = num_wanted == num_weights ? of(grad) : at::Tensor();
      std::int64_t at = 0;
      for (std::size_t i = 0; i < num_weights; at += weights[i].size(0), ++i) {
        const std::int64_t outputs = weights[i].size(0);
        if (!ctx->needs_input_grad(first + i)) continue;
        result[first + i] = all.defined() ? all.narrow(0, at, outputs) : of(grad.narrow(1, at, outputs));
      }
    };
    // In the weight's own layout, which for a view of [I, O] is the transposed one.
    fill(1, [&](const at::Tensor& of) {
      return weights[0].stride(1) == 1 ? matrix_product(of.t(), x) : matrix_product(x.t(), of).t();
    });
    if (has_bias)
      fill(1 + num_weights,
           [&](const at::Tensor& of) { return takes_bf16_products(of) ? bf16_column_sums(of) : of.sum(0); });
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
