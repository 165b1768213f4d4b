#pragma once
// Point-wise activations by their Hugging Face names (transformers' ACT2FN). fp32, bf16 or fp16; the value is computed
// in fp32. gelu_tanh is a kernel of this folder (1.4 times as fast as ATen's), whose bits do not depend on threads or
// instruction set; the others are ATen's (its gelu_erf is three times as fast as the best tried here).
#include <cstdint>
#include <optional>
#include <string>
#include <string_view>

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>

namespace shardtune {

enum class Activation { gelu_erf, gelu_tanh, relu, silu, tanh };

// gelu, gelu_python; gelu_new, gelu_fast, gelu_accurate, gelu_pytorch_tanh, gelu_python_tanh; relu; silu, swish; tanh;
// nullopt for anything else.
std::optional<Activation> find_activation(std::string_view name);
std::string activation_names();  // the list above, for messages

at::Tensor activate(const at::Tensor& x, Activation activation);

// Private to kernels/: the pieces of gelu_tanh for a product that applies it while it stores its result
// (bf16_gemm.hpp), the same bits as activate() and its gradient.
using ActivateBlock = void (*)(const c10::BFloat16* x, c10::BFloat16* y, std::int64_t numel);
ActivateBlock find_block_activation(Activation activation);  // null for others than gelu_tanh
// grad times the derivative at x, both contiguous. gelu_tanh only.
at::Tensor activation_gradient(const at::Tensor& x, const at::Tensor& grad, Activation activation);

}  // namespace shardtune
