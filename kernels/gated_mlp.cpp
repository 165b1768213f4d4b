#include "kernels/gated_mlp.hpp"

#include <algorithm>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/element_type.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

using simd::Float;
using simd::load_at;
using simd::sigmoid;
using simd::store_at;

constexpr std::int64_t kElementsOfATask = 16384;

// visit(row, at, end) for every vector of [rows, width] as simd::for_each_vector, shared among threads by rows.
template <class Visit>
void for_each_row_vector(std::int64_t rows, std::int64_t width, const Visit& visit) {
  const std::int64_t grain = std::max<std::int64_t>(1, kElementsOfATask / std::max<std::int64_t>(1, width));
  at::parallel_for(0, rows, grain, [&](std::int64_t first, std::int64_t last) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t row = first; row < last; ++row)
        simd::for_each_vector(width,
                              [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY { visit(row, at, end); });
    });
  });
}

template <class T>
at::Tensor run_forward(const at::Tensor& gate_up) {
  const std::int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  at::Tensor out = at::empty({rows, width}, gate_up.options());
  const T* in = gate_up.const_data_ptr<T>();
  T* o = out.mutable_data_ptr<T>();
  for_each_row_vector(rows, width, [&](std::int64_t row, std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    const T* gate = in + row * 2 * width;
    const Float x = load_at(gate, at, end);
    store_at(o + row * width, at, end, x * sigmoid(x) * load_at(gate + width, at, end));
  });
  return out;
}

template <class T>
at::Tensor run_backward(const at::Tensor& grad, const at::Tensor& gate_up) {
  const std::int64_t rows = gate_up.size(0), width = gate_up.size(1) / 2;
  at::Tensor d_gate_up = at::empty_like(gate_up);
  const T *in = gate_up.const_data_ptr<T>(), *d = grad.const_data_ptr<T>();
  T* out = d_gate_up.mutable_data_ptr<T>();
  for_each_row_vector(rows, width, [&](std::int64_t row, std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    const T* gate = in + row * 2 * width;
    T* d_gate = out + row * 2 * width;
    const Float x = load_at(gate, at, end), g = load_at(d + row * width, at, end), s = sigmoid(x);
    store_at(d_gate + width, at, end, g * x * s);
    store_at(d_gate, at, end, g * load_at(gate + width, at, end) * s * (1.0F + x * (1.0F - s)));
  });
  return d_gate_up;
}

struct SiluAndMul : torch::autograd::Function<SiluAndMul> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gate_up_any) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const at::Tensor gate_up = gate_up_any.contiguous();
    ctx->save_for_backward({gate_up});
    at::Tensor out;
    with_element_type(gate_up.scalar_type(), [&](auto element) { out = run_forward<decltype(element)>(gate_up); });
    return out;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const at::Tensor gate_up = ctx->get_saved_variables()[0], grad = grads[0].contiguous();
    at::Tensor result;
    with_element_type(grad.scalar_type(),
                      [&](auto element) { result = run_backward<decltype(element)>(grad, gate_up); });
    return {result};
  }
};

}  // namespace

at::Tensor silu_and_mul(const at::Tensor& gate_up) {
  check_internal(gate_up.dim() == 2 && gate_up.size(1) % 2 == 0, "silu_and_mul takes [T, 2 F]");
  return SiluAndMul::apply(gate_up);
}

at::Tensor silu_and_mul_reference(const at::Tensor& gate_up) {
  const auto halves = gate_up.to(gate_up.scalar_type() == at::kDouble ? at::kDouble : at::kFloat).chunk(2, 1);
  return (at::silu(halves[0]) * halves[1]).to(gate_up.scalar_type());
}

}  // namespace shardtune
