#include "kernels/gated_mlp.hpp"

#include <algorithm>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/element_type.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

using simd::Float;
using simd::kLanes;

SHARDTUNE_INLINE Float sigmoid(const Float& x) {
  const Float small = simd::exp_non_positive(x < 0.0F ? x : -x);  // e^-|x| never overflows
  return (x < 0.0F ? small : simd::broadcast(1.0F)) / (small + 1.0F);
}

template <class T>
SHARDTUNE_INLINE Float load_at(const T* from, std::int64_t left) {
  return left >= kLanes ? simd::load(from) : simd::load_some(from, left, 0.0F);
}
template <class T>
SHARDTUNE_INLINE void store_at(T* to, const Float& value, std::int64_t left) {
  if (left >= kLanes)
    simd::store(to, value);
  else
    simd::store_some(to, value, left);
}

template <class T>
void forward_elements(const at::Tensor& gate, const at::Tensor& up, at::Tensor& out) {
  const T *g = gate.const_data_ptr<T>(), *u = up.const_data_ptr<T>();
  T* o = out.mutable_data_ptr<T>();
  const std::int64_t numel = gate.numel();
  at::parallel_for(0, (numel + kLanes - 1) / kLanes, 1024, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t at = begin * kLanes; at < std::min(numel, end * kLanes); at += kLanes) {
        const Float x = load_at(g + at, numel - at);
        store_at(o + at, x * sigmoid(x) * load_at(u + at, numel - at), numel - at);
      }
    });
  });
}

struct BackwardTensors {
  const at::Tensor &grad, &gate, &up;
  at::Tensor &d_gate, &d_up;
};

template <class T>
void backward_elements(const BackwardTensors& io) {
  const T *d = io.grad.const_data_ptr<T>(), *g = io.gate.const_data_ptr<T>(), *u = io.up.const_data_ptr<T>();
  T *dg = io.d_gate.mutable_data_ptr<T>(), *du = io.d_up.mutable_data_ptr<T>();
  const std::int64_t numel = io.gate.numel();
  at::parallel_for(0, (numel + kLanes - 1) / kLanes, 1024, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t at = begin * kLanes; at < std::min(numel, end * kLanes); at += kLanes) {
        const std::int64_t left = numel - at;
        const Float x = load_at(g + at, left), grad = load_at(d + at, left), s = sigmoid(x);
        store_at(du + at, grad * x * s, left);
        store_at(dg + at, grad * load_at(u + at, left) * s * (1.0F + x * (1.0F - s)), left);
      }
    });
  });
}

struct SiluAndMul : torch::autograd::Function<SiluAndMul> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& gate_any,
                            const at::Tensor& up_any) {
    const at::Tensor gate = gate_any.contiguous(), up = up_any.contiguous();
    ctx->save_for_backward({gate, up});
    at::Tensor out = at::empty_like(gate);
    with_element_type(gate.scalar_type(), [&](auto element) { forward_elements<decltype(element)>(gate, up, out); });
    return out;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor grad = grads[0].contiguous();
    at::Tensor d_gate = at::empty_like(saved[0]), d_up = at::empty_like(saved[1]);
    const BackwardTensors io{grad, saved[0], saved[1], d_gate, d_up};
    with_element_type(grad.scalar_type(), [&](auto element) { backward_elements<decltype(element)>(io); });
    return {d_gate, d_up};
  }
};

}  // namespace

at::Tensor silu_and_mul(const at::Tensor& gate, const at::Tensor& up) { return SiluAndMul::apply(gate, up); }

at::Tensor silu_and_mul_reference(const at::Tensor& gate, const at::Tensor& up) {
  const auto wide = [](const at::Tensor& x) { return x.scalar_type() == at::kDouble ? x : x.to(at::kFloat); };
  return (at::silu(wide(gate)) * wide(up)).to(gate.scalar_type());
}

}  // namespace shardtune
