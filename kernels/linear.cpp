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

at::Tensor as_in_out(const at::Tensor& weight, bool is_transposed) { return is_transposed ? weight : weight.t(); }

// What autograd would cast the gradient to.
at::ScalarType gradient_dtype(const at::Tensor& weight) {
  return weight.is_leaf() ? weight.grad_dtype().value_or(weight.scalar_type()) : weight.scalar_type();
}

// As many weights as outputs; as many biases, or none. Rows of the result: all outputs side by side.
struct Linear : torch::autograd::Function<Linear> {
  static at::Tensor forward(AutogradContext* ctx, const at::Tensor& x_any, at::TensorList weights,
                            at::TensorList biases, bool is_transposed, std::int64_t activation) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const at::Tensor x = x_any.contiguous();
    const at::Tensor bias = biases.empty() ? at::Tensor() : biases.size() == 1 ? biases[0] : at::cat(biases);
    ctx->saved_data["weights"] = static_cast<std::int64_t>(weights.size());
    ctx->saved_data["has_bias"] = !biases.empty();
    ctx->saved_data["is_transposed"] = is_transposed;
    ctx->saved_data["activation"] = activation;
    variable_list saved{x};
    saved.insert(saved.end(), weights.begin(), weights.end());
    at::Tensor y;
    if (activation == kNoActivation) {
      std::vector<at::Tensor> right;
      for (const at::Tensor& weight : weights) right.push_back(as_in_out(weight, is_transposed));
      y = matrix_product(x, right, 1, bias);
    } else {
      const auto [product, activated] =
          bf16_gemm_activated(x, as_in_out(weights[0], is_transposed), bias, static_cast<Activation>(activation));
      saved.push_back(product);
      y = activated;
    }
    ctx->save_for_backward(saved);
    return y;
  }

  static variable_list backward(AutogradContext* ctx, const variable_list& grads) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const auto saved = ctx->get_saved_variables();
    const auto num_weights = static_cast<std::size_t>(ctx->saved_data["weights"].toInt());
    const bool is_transposed = ctx->saved_data["is_transposed"].toBool();
    const at::TensorList weights = at::TensorList(saved).slice(1, num_weights);
    const at::Tensor& x = saved[0];
    const std::int64_t activation = ctx->saved_data["activation"].toInt();
    at::Tensor grad = grads[0].contiguous();
    if (activation != kNoActivation)
      grad = activation_gradient(saved.back(), grad, static_cast<Activation>(activation));
    const bool has_bias = ctx->saved_data["has_bias"].toBool();
    variable_list result(1 + num_weights * (has_bias ? 2 : 1) + 2);
    if (ctx->needs_input_grad(0))
      result[0] = is_transposed ? matrix_product(grad, weights[0].t()) : matrix_product(grad, weights, 0, {});
    // A gradient of all layers at once, shared out; where some are frozen, one by one of the others.
    const auto fill = [&](std::size_t first, const auto& of) {
      std::size_t num_wanted = 0;
      for (std::size_t i = 0; i < num_weights; ++i) num_wanted += ctx->needs_input_grad(first + i) ? 1 : 0;
      if (num_wanted == 0) return;
      const at::Tensor all = num_wanted == num_weights ? of(grad, weights[0]) : at::Tensor();
      if (num_weights == 1) {
        result[first] = all;
        return;
      }
      std::int64_t at = 0;
      for (std::size_t i = 0; i < num_weights; at += weights[i].size(0), ++i) {
        const std::int64_t outputs = weights[i].size(0);
        if (!ctx->needs_input_grad(first + i)) continue;
        result[first + i] = all.defined() ? all.narrow(0, at, outputs) : of(grad.narrow(1, at, outputs), weights[i]);
      }
    };
    fill(1, [&](const at::Tensor& of, const at::Tensor& weight) {
      return is_transposed ? matrix_product_in(gradient_dtype(weight), x.t(), of)
                           : matrix_product_in(gradient_dtype(weight), of.t(), x);
    });
    if (has_bias)
      fill(1 + num_weights, [&](const at::Tensor& of, const at::Tensor& /*weight*/) {
        return takes_bf16_products(of) ? bf16_column_sums(of) : of.sum(0);
      });
    return result;
  }
};

at::Tensor apply(const at::Tensor& x, const std::vector<LinearOperands>& layers, std::int64_t activation) {
  check_internal(!layers.empty(), "a product needs a layer");
  std::vector<at::Tensor> weights, biases;
  for (const LinearOperands& layer : layers) {
    weights.push_back(layer.weight);
    if (layer.bias.defined()) biases.push_back(layer.bias);
    check_internal(!layer.is_transposed || layers.size() == 1, "a product of several layers takes weights [O, I]");
  }
  check_internal(biases.empty() || biases.size() == weights.size(),
                 "either all layers of a product have a bias or none");
  return Linear::apply(x, at::TensorList(weights), at::TensorList(biases), layers.front().is_transposed, activation);
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
  return activate(apply(x, {layer}, kNoActivation), activation);
}

}  // namespace shardtune
