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
using simd::kLanes;

// direction +1 rotates, -1 rotates back (the transpose, which is the backward pass).
template <class T>
void rotate_rows(const at::Tensor& x, const RopeTables& tables, float direction, at::Tensor& y) {
  const std::int64_t heads = x.size(1), half = x.size(2) / 2, stride = x.stride(0);
  const T* in = x.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  const auto *cos = tables.cos.const_data_ptr<float>(), *sin = tables.sin.const_data_ptr<float>();
  at::parallel_for(0, x.size(0), 16, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t row = begin * heads; row < end * heads; ++row) {
        const T *low = in + row / heads * stride + row % heads * 2 * half, *high = low + half;
        T *out_low = out + row * 2 * half, *out_high = out_low + half;
        const float *c = cos + row / heads * half, *s = sin + row / heads * half;
        for (std::int64_t i = 0; i < half; i += kLanes) {
          const std::int64_t n = std::min(kLanes, half - i);
          if (n == kLanes) {
            const Float a = simd::load(low + i), b = simd::load(high + i), cv = simd::load(c + i);
            const Float sv = simd::load(s + i) * direction;
            simd::store(out_low + i, a * cv - b * sv);
            simd::store(out_high + i, b * cv + a * sv);
          } else {
            const Float a = simd::load_some(low + i, n, 0.0F), b = simd::load_some(high + i, n, 0.0F);
            const Float cv = simd::load_some(c + i, n, 0.0F), sv = simd::load_some(s + i, n, 0.0F) * direction;
            simd::store_some(out_low + i, a * cv - b * sv, n);
            simd::store_some(out_high + i, b * cv + a * sv, n);
          }
        }
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
    ctx->save_for_backward({cos, sin});
    return rotate(x, {cos, sin}, 1.0F);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
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
