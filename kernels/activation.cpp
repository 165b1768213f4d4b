#include "kernels/activation.hpp"

#include <utility>

#include <ATen/ATen.h>

#include "core/error.hpp"

namespace shardtune {
namespace {
// Several spellings of the same formulas.
constexpr std::pair<std::string_view, Activation> kNames[] = {{"gelu", Activation::gelu_erf},
                                                              {"gelu_python", Activation::gelu_erf},
                                                              {"gelu_new", Activation::gelu_tanh},
                                                              {"gelu_python_tanh", Activation::gelu_tanh},
                                                              {"gelu_accurate", Activation::gelu_tanh},
                                                              {"gelu_fast", Activation::gelu_tanh},
                                                              {"gelu_pytorch_tanh", Activation::gelu_tanh},
                                                              {"relu", Activation::relu},
                                                              {"silu", Activation::silu},
                                                              {"swish", Activation::silu},
                                                              {"tanh", Activation::tanh}};
}  // namespace

std::optional<Activation> find_activation(std::string_view name) {
  for (const auto& [known, activation] : kNames)
    if (known == name) return activation;
  return std::nullopt;
}

std::string activation_names() {
  std::string list;
  for (const auto& [name, activation] : kNames) list += (list.empty() ? "" : ", ") + std::string(name);
  return list;
}

at::Tensor activate(const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::gelu_erf: return at::gelu(x);
    case Activation::gelu_tanh: return at::gelu(x, "tanh");
    case Activation::relu: return at::relu(x);
    case Activation::silu: return at::silu(x);
    case Activation::tanh: return at::tanh(x);
  }
  fail(ErrorKind::internal, "unknown activation");
}

}  // namespace shardtune
