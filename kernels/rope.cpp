#include "kernels/rope.hpp"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/element_type.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

using simd::Float;

// direction +1 rotates, -1 rotates back (the transpose, which is the backward pass).
template <class T>
void rotate_rows(const at::Tensor& x, const RopeTables& tables, float direction, at::Tensor& y) {
  const std::int64_t heads = x.size(1), half = x.size(2) / 2, stride = x.stride(0);
  const T* in = x.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  const auto *cos = tables.cos.const_data_ptr<float>(), *sin = tables.sin.const_data_ptr<float>();
  at::parallel_for(0, x.size(0), 16, [&](std::int64_t first, std::int64_t last) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t row = first * heads; row < last * heads; ++row) {
        const T *low = in + row / heads * stride + row % heads * 2 * half, *high = low + half;
        T *out_low = out + row * 2 * half, *out_high = out_low + half;
        const float *c = cos + row / heads * half, *s = sin + row / heads * half;
        simd::for_each_vector(half, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
          const Float a = simd::load_at(low, at, end), b = simd::load_at(high, at, end);
          const Float cv = simd::load_at(c, at, end), sv = simd::load_at(s, at, end) * direction;
          simd::store_at(out_low, at, end, a * cv - b * sv);
          simd::store_at(out_high, at, end, b * cv + a * sv);
        });
      }
    });
  });
}

at::Tensor rotate(const at::Tensor& x_any, const RopeTables& tables, float direction) {
  const bool has_dense_rows = x_any.stride(2) == 1 && x_any.stride(1) == x_any.size(2);
  const at::Tensor x = has_dense_rows ? x_any : x_any.contiguous();
  at::Tensor y = at::empty(x.sizes(), x.options());
  with_element_type(x.scalar_type(), [&](auto element) { rotate_rows<decltype(element)>(x, tables, direction, y); });
  return y;
}

struct Rope : torch::autograd::Function<Rope> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, const at::Tensor& cos,
                            const at::Tensor& sin) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    ctx->save_for_backward({cos, sin});
    return rotate(x, {cos, sin}, 1.0F);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const auto saved = ctx->get_saved_variables();
    return {rotate(grads[0], {saved[0], saved[1]}, -1.0F), {}, {}};
  }
};

}  // namespace

RopeTables make_rope_tables(const at::Tensor& positions, const at::Tensor& inverse_frequencies) {
  const at::Tensor angles = positions.to(at::kFloat).unsqueeze(1) * inverse_frequencies.unsqueeze(0);
  return {angles.cos(), angles.sin()};
}

at::Tensor rope(const at::Tensor& x, const RopeTables& tables) {
  check_internal(x.dim() == 3 && x.size(2) == 2 * tables.cos.size(1) && x.size(0) == tables.cos.size(0),
                 "rope tables do not fit the tensor");
  return Rope::apply(x, tables.cos, tables.sin);
}

at::Tensor rope_reference(const at::Tensor& x, const RopeTables& tables) {
  const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  const at::Tensor cos = at::cat({tables.cos, tables.cos}, -1).unsqueeze(1);
  const at::Tensor sin = at::cat({tables.sin, tables.sin}, -1).unsqueeze(1);
  const auto halves = wide.chunk(2, -1);
  return (wide * cos + at::cat({-halves[1], halves[0]}, -1) * sin).to(x.scalar_type());
}

}  // namespace shardtune
