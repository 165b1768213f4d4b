#include "kernels/norm.hpp"

#include <cmath>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/simd.hpp"

namespace shardtune {
namespace {

using simd::Float;
using simd::kLanes;

// Rows whose weight gradients are summed together; fixed, so that the bits do not depend on the number of threads.
constexpr std::int64_t kRowBlock = 64;

template <class T>
SHARDTUNE_INLINE Float load_at(const T* row, std::int64_t at, std::int64_t width) {
  return width - at >= kLanes ? simd::load(row + at) : simd::load_some(row + at, width - at, 0.0F);
}
template <class T>
SHARDTUNE_INLINE void store_at(T* row, std::int64_t at, std::int64_t width, const Float& value) {
  if (width - at >= kLanes)
    simd::store(row + at, value);
  else
    simd::store_some(row + at, value, width - at);
}

template <class T>
void rms_rows(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor& y, at::Tensor& rstd) {
  const std::int64_t width = x.size(1);
  const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  auto* scale = rstd.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), 16, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t t = begin; t < end; ++t) {
        Float squares{};
        for (std::int64_t at = 0; at < width; at += kLanes) {
          const Float value = load_at(in + t * width, at, width);
          squares += value * value;
        }
        const auto inverse =
            static_cast<float>(1.0 / std::sqrt(simd::sum_lanes(squares) / static_cast<double>(width) + eps));
        scale[t] = inverse;
        for (std::int64_t at = 0; at < width; at += kLanes)
          store_at(out + t * width, at, width, load_at(in + t * width, at, width) * inverse * load_at(w, at, width));
      }
    });
  });
}

struct RmsBackward {
  const at::Tensor &grad, &x, &weight, &rstd;
  at::Tensor& dx;
  at::Tensor& dw_blocks;  // [ceil(T / kRowBlock), D] fp32
};

template <class T>
SHARDTUNE_INLINE void rms_backward_row(const RmsBackward& io, std::int64_t t, float* dw) {
  const std::int64_t width = io.x.size(1);
  const T *g = io.grad.const_data_ptr<T>() + t * width, *x = io.x.const_data_ptr<T>() + t * width;
  const T* w = io.weight.const_data_ptr<T>();
  T* dx = io.dx.mutable_data_ptr<T>() + t * width;
  const float inverse = io.rstd.const_data_ptr<float>()[t];
  Float dots{};
  for (std::int64_t at = 0; at < width; at += kLanes) {
    const Float normalised = load_at(x, at, width) * inverse, gv = load_at(g, at, width);
    dots += gv * load_at(w, at, width) * normalised;
    store_at(dw, at, width, load_at(dw, at, width) + gv * normalised);
  }
  const auto mean = static_cast<float>(simd::sum_lanes(dots) / static_cast<double>(width));
  for (std::int64_t at = 0; at < width; at += kLanes) {
    const Float normalised = load_at(x, at, width) * inverse;
    store_at(dx, at, width, (load_at(g, at, width) * load_at(w, at, width) - normalised * mean) * inverse);
  }
}

template <class T>
void rms_backward(const RmsBackward& io) {
  const std::int64_t tokens = io.x.size(0), width = io.x.size(1);
  at::parallel_for(0, io.dw_blocks.size(0), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      float* dw = io.dw_blocks.mutable_data_ptr<float>() + block * width;
      simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
        for (std::int64_t t = block * kRowBlock; t < std::min(tokens, (block + 1) * kRowBlock); ++t)
          rms_backward_row<T>(io, t, dw);
      });
    }
  });
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_any, const at::Tensor& weight,
                            double eps) {
    const at::Tensor x = x_any.contiguous();
    at::Tensor y = at::empty_like(x), rstd = at::empty({x.size(0)}, at::kFloat);
    if (x.scalar_type() == at::kBFloat16)
      rms_rows<c10::BFloat16>(x, weight, eps, y, rstd);
    else
      rms_rows<float>(x, weight, eps, y, rstd);
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor grad = grads[0].contiguous();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    at::Tensor dx = at::empty_like(x);
    at::Tensor dw_blocks = at::zeros({(x.size(0) + kRowBlock - 1) / kRowBlock, x.size(1)}, at::kFloat);
    const RmsBackward io{grad, x, weight, rstd, dx, dw_blocks};
    if (x.scalar_type() == at::kBFloat16)
      rms_backward<c10::BFloat16>(io);
    else
      rms_backward<float>(io);
    return {dx, dw_blocks.sum(0), {}};
  }
};

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  return std::get<0>(at::native_layer_norm(x, weight.sizes(), weight, bias, eps));
}

at::Tensor layer_norm_reference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  const at::Tensor centred = wide - wide.mean(-1, true);
  const at::Tensor y = centred * at::rsqrt(centred.square().mean(-1, true) + eps);
  return (y * weight + bias).to(x.scalar_type());
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return RmsNorm::apply(x, weight, eps);
}

at::Tensor rms_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  return (wide * at::rsqrt(wide.square().mean(-1, true) + eps) * weight).to(x.scalar_type());
}

}  // namespace shardtune
