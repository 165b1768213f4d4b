#pragma once
// Point-wise activations by their Hugging Face names (transformers' ACT2FN). fp32, bf16 or fp16; the value is computed
// in fp32. gelu_tanh is a kernel of this folder (1.4 times as fast as ATen's), whose bits do not depend on threads or
// instruction set; the others are ATen's.
#include <optional>
#include <string>
#include <string_view>

#include <ATen/core/Tensor.h>

namespace shardtune {

enum class Activation { gelu_erf, gelu_tanh, relu, silu, tanh };

// gelu, gelu_python; gelu_new, gelu_fast, gelu_accurate, gelu_pytorch_tanh, gelu_python_tanh; relu; silu, swish; tanh;
// nullopt for anything else.
std::optional<Activation> find_activation(std::string_view name);
std::string activation_names();  // the list above, for messages

at::Tensor activate(const at::Tensor& x, Activation activation);

}  // namespace shardtune
