#include "kernels/activation.hpp"

#include <algorithm>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/element_type.hpp"
#include "kernels/simd.hpp"

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

using simd::Float;
using simd::kLanes;

enum class Wanted { value, slope };

// x share(x), or its derivative. share = (1 + tanh(u)) / 2 = 1 / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): no
// cancellation on the negative side.
template <Wanted kWanted>
SHARDTUNE_INLINE Float gelu_tanh(const Float& x) {
  constexpr float kTwice = 1.5957691216057308F, kCubic = 0.044715F;
  constexpr float kFar = 10.0F;  // share is 0 or 1 beyond it; 2u is 87.31 there, just within exp_bounded
  Float near = x > kFar ? simd::broadcast(kFar) : x;
  near = near < -kFar ? simd::broadcast(-kFar) : near;
  const Float square = near * near, argument = near * (square * (kTwice * kCubic) + kTwice);
  const Float one = simd::broadcast(1.0F), some = simd::exp_bounded(simd::negative_magnitude(argument));
  const Float e = x < -kFar ? Float{} : some;
  const Float inverse = 1.0F / (e + 1.0F), share = (argument > 0.0F ? one : e) * inverse;
  if constexpr (kWanted == Wanted::value) return x * share;
  return share + near * e * inverse * inverse * (square * (3.0F * kTwice * kCubic) + kTwice);
}

template <Wanted kWanted>
SHARDTUNE_INLINE Float silu(const Float& x) {
  const Float share = simd::sigmoid(x);
  if constexpr (kWanted == Wanted::value) return x * share;
  return share * (1.0F + x * (1.0F - share));
}

template <Activation kFormula, Wanted kWanted>
SHARDTUNE_INLINE Float apply(const Float& x) {
  if constexpr (kFormula == Activation::silu)
    return silu<kWanted>(x);
  else
    return gelu_tanh<kWanted>(x);
}

// y = f(x), or y = f'(x) grad, of consecutive numbers.
template <Activation kFormula, Wanted kWanted, class T>
SHARDTUNE_INLINE void run_row(const T* x, [[maybe_unused]] const T* grad, T* y, std::int64_t numel) {
  simd::for_each_vector(numel, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    Float result = apply<kFormula, kWanted>(simd::load_at(x, at, end));
    if constexpr (kWanted == Wanted::slope) result *= simd::load_at(grad, at, end);
    simd::store_at(y, at, end, result);
  });
}

template <Activation kFormula>
at::Tensor run(const at::Tensor& x, const at::Tensor& grad) {
  at::Tensor y = at::empty_like(x);
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const T *in = x.const_data_ptr<T>(), *seed = grad.defined() ? grad.const_data_ptr<T>() : nullptr;
    T* out = y.mutable_data_ptr<T>();
    const std::int64_t numel = x.numel();
    at::parallel_for(0, (numel + kLanes - 1) / kLanes, 2048, [&](std::int64_t begin, std::int64_t end) {
      const std::int64_t first = begin * kLanes, count = std::min(numel, end * kLanes) - first;
      simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
        if (seed != nullptr)
          run_row<kFormula, Wanted::slope>(in + first, seed + first, out + first, count);
        else
          run_row<kFormula, Wanted::value>(in + first, static_cast<const T*>(nullptr), out + first, count);
      });
    });
  });
  return y;
}

void gelu_block(const c10::BFloat16* x, c10::BFloat16* y, std::int64_t numel) {
  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
    run_row<Activation::gelu_tanh, Wanted::value>(x, static_cast<const c10::BFloat16*>(nullptr), y, numel);
  });
}

template <Activation kFormula>
struct Activate : torch::autograd::Function<Activate<kFormula>> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_any) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const at::Tensor x = x_any.contiguous();
    ctx->save_for_backward({x});
    return run<kFormula>(x, {});
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    return {run<kFormula>(ctx->get_saved_variables()[0], grads[0].contiguous())};
  }
};

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
    // Of dense numbers: ATen's loop over others, and its silu, compute what is left over at the end of each thread's
    // part by another function.
    case Activation::gelu_erf: return at::gelu(x.contiguous());
    case Activation::gelu_tanh: return Activate<Activation::gelu_tanh>::apply(x);
    case Activation::relu: return at::relu(x);
    case Activation::silu: return Activate<Activation::silu>::apply(x);
    case Activation::tanh: return at::tanh(x);
  }
  fail(ErrorKind::internal, "unknown activation");
}

ActivateBlock find_block_activation(Activation activation) {
  return activation == Activation::gelu_tanh ? gelu_block : nullptr;
}

at::Tensor activation_gradient(const at::Tensor& x, const at::Tensor& grad, Activation activation) {
  check_internal(find_block_activation(activation) != nullptr, "only gelu_tanh has a gradient of its own");
  return run<Activation::gelu_tanh>(x, grad);
}

}  // namespace shardtune
