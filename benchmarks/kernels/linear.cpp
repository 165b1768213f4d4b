// y = x W^T + b and its gradients on the layers of GPT-2 124M and of MiniLM.
#include <array>

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "benchmarks/kernels/comparison.hpp"
#include "kernels/linear.hpp"

namespace shardtune::measurement {

void add_linear() {
  struct Shape {
    std::int64_t tokens, in, out;
  };
  constexpr std::array shapes = {Shape{4096, 768, 2304}, Shape{4096, 768, 768},   Shape{4096, 768, 3072},
                                 Shape{4096, 3072, 768}, Shape{1024, 768, 50257}, Shape{784, 384, 384},
                                 Shape{784, 384, 1536},  Shape{784, 1536, 384}};
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat})
    for (const auto& [tokens, in, out] : shapes) {
      const Comparison comparison{fmt::format("linear/{}x{}x{}/{}", tokens, in, out, name_of(dtype)),
                                  [=, tokens = tokens, in = in, out = out] {
                                    return Tensors{random_numbers({tokens, in}, dtype),
                                                   random_numbers({out, in}, dtype), random_numbers({out}, dtype)};
                                  },
                                  [](const Tensors& inputs) { return apply_linear(inputs[0], inputs[1], inputs[2]); },
                                  [](const Tensors& inputs) { return at::linear(inputs[0], inputs[1], inputs[2]); }};
      const Work product{.flops = 2.0 * static_cast<double>(tokens * in * out)};
      add_forward(comparison, product);
      add_gradient(comparison, "dx", 0, product);
      add_gradient(comparison, "dW", 1, product);
      add_gradient(comparison, "db", 2, {.bytes = static_cast<double>(tokens * out) * at::elementSize(dtype)});
    }
}

}  // namespace shardtune::measurement
