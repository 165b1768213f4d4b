#include "kernels/norm.hpp"

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "kernels/element_type.hpp"
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

std::int64_t num_row_blocks(std::int64_t tokens) { return (tokens + kRowBlock - 1) / kRowBlock; }

// visit(block, first row, one past the last row)
template <class F>
void for_each_row_block(std::int64_t tokens, const F& visit) {
  at::parallel_for(0, num_row_blocks(tokens), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block)
      visit(block, block * kRowBlock, std::min(tokens, (block + 1) * kRowBlock));
  });
}

// Sum of term(at) over the row's vectors; four running sums hide the latency of the adds.
template <class F>
SHARDTUNE_INLINE double sum_row(std::int64_t width, const F& term) {
  Float parts[4]{};
  std::int64_t at = 0;
  for (; at + 4 * kLanes <= width; at += 4 * kLanes)
    for (std::int64_t i = 0; i < 4; ++i) parts[i] += term(at + i * kLanes);
  for (; at < width; at += kLanes) parts[0] += term(at);
  return simd::sum_lanes((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

// --- RMS norm ----------------------------------------------------------------------------------------------------

template <class T>
void rms_rows(const at::Tensor& x, const at::Tensor& weight, double eps, at::Tensor& y, at::Tensor& rstd) {
  const std::int64_t width = x.size(1);
  const T *in = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
  T* out = y.mutable_data_ptr<T>();
  auto* scale = rstd.mutable_data_ptr<float>();
  at::parallel_for(0, x.size(0), 16, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t t = begin; t < end; ++t) {
        const double squares = sum_row(width, [&](std::int64_t at) SHARDTUNE_VECTOR_BODY {
          const Float value = load_at(in + t * width, at, width);
          return value * value;
        });
        const auto inverse = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + eps));
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
  for_each_row_block(io.x.size(0), [&](std::int64_t block, std::int64_t first, std::int64_t last) {
    float* dw = io.dw_blocks.mutable_data_ptr<float>() + block * io.dw_blocks.size(1);
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t t = first; t < last; ++t) rms_backward_row<T>(io, t, dw);
    });
  });
}

struct RmsNorm : torch::autograd::Function<RmsNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_any, const at::Tensor& weight,
                            double eps) {
    const at::Tensor x = x_any.contiguous();
    at::Tensor y = at::empty_like(x), rstd = at::empty({x.size(0)}, at::kFloat);
    with_element_type(x.scalar_type(), [&](auto element) { rms_rows<decltype(element)>(x, weight, eps, y, rstd); });
    ctx->save_for_backward({x, weight, rstd});
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor grad = grads[0].contiguous();
    const at::Tensor &x = saved[0], &weight = saved[1], &rstd = saved[2];
    at::Tensor dx = at::empty_like(x);
    at::Tensor dw_blocks = at::zeros({num_row_blocks(x.size(0)), x.size(1)}, at::kFloat);
    const RmsBackward io{grad, x, weight, rstd, dx, dw_blocks};
    with_element_type(x.scalar_type(), [&](auto element) { rms_backward<decltype(element)>(io); });
    return {dx, dw_blocks.sum(0), {}};
  }
};

// --- layer norm --------------------------------------------------------------------------------------------------

struct LayerForward {
  const at::Tensor &x, &weight, &bias;
  double eps;
  at::Tensor &y, &mean, &rstd;
};

// Mean first, then the squares of what is left: no cancellation however large the mean.
template <class T>
SHARDTUNE_INLINE void layer_row(const LayerForward& io, std::int64_t t) {
  const std::int64_t width = io.x.size(1);
  const T *x = io.x.const_data_ptr<T>() + t * width, *w = io.weight.const_data_ptr<T>();
  const T* b = io.bias.const_data_ptr<T>();
  T* y = io.y.mutable_data_ptr<T>() + t * width;
  const double sum = sum_row(width, [&](std::int64_t at) SHARDTUNE_VECTOR_BODY { return load_at(x, at, width); });
  const auto mean = static_cast<float>(sum / static_cast<double>(width));
  const double squares = sum_row(width, [&](std::int64_t at) SHARDTUNE_VECTOR_BODY {
    Float centred = load_at(x, at, width) - mean;
    if (width - at < kLanes)
      for (std::int64_t lane = width - at; lane < kLanes; ++lane) centred[lane] = 0.0F;
    return centred * centred;
  });
  const auto rstd = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + io.eps));
  io.mean.mutable_data_ptr<float>()[t] = mean;
  io.rstd.mutable_data_ptr<float>()[t] = rstd;
  for (std::int64_t at = 0; at < width; at += kLanes)
    store_at(y, at, width, (load_at(x, at, width) - mean) * rstd * load_at(w, at, width) + load_at(b, at, width));
}

template <class T>
void layer_rows(const LayerForward& io) {
  at::parallel_for(0, io.x.size(0), 16, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t t = begin; t < end; ++t) layer_row<T>(io, t);
    });
  });
}

struct LayerBackward {
  const at::Tensor &grad, &x, &weight, &mean, &rstd;
  at::Tensor& dx;
  at::Tensor& dw_blocks;  // [ceil(T / kRowBlock), 2 D] fp32: of the weight, then of the bias
};

template <class T>
SHARDTUNE_INLINE void layer_backward_row(const LayerBackward& io, std::int64_t t, float* dw) {
  const std::int64_t width = io.x.size(1);
  const T *g = io.grad.const_data_ptr<T>() + t * width, *x = io.x.const_data_ptr<T>() + t * width;
  const T* w = io.weight.const_data_ptr<T>();
  T* dx = io.dx.mutable_data_ptr<T>() + t * width;
  float* db = dw + width;
  const float mean = io.mean.const_data_ptr<float>()[t], rstd = io.rstd.const_data_ptr<float>()[t];
  Float sums{}, dots{};
  for (std::int64_t at = 0; at < width; at += kLanes) {  // lanes beyond the row hold g = 0
    const Float normalised = (load_at(x, at, width) - mean) * rstd, gv = load_at(g, at, width);
    const Float gw = gv * load_at(w, at, width);
    sums += gw;
    dots += gw * normalised;
    store_at(dw, at, width, load_at(dw, at, width) + gv * normalised);
    store_at(db, at, width, load_at(db, at, width) + gv);
  }
  const auto sum = static_cast<float>(simd::sum_lanes(sums) / static_cast<double>(width));
  const auto dot = static_cast<float>(simd::sum_lanes(dots) / static_cast<double>(width));
  for (std::int64_t at = 0; at < width; at += kLanes) {
    const Float normalised = (load_at(x, at, width) - mean) * rstd;
    store_at(dx, at, width, (load_at(g, at, width) * load_at(w, at, width) - sum - normalised * dot) * rstd);
  }
}

template <class T>
void layer_backward(const LayerBackward& io) {
  for_each_row_block(io.x.size(0), [&](std::int64_t block, std::int64_t first, std::int64_t last) {
    float* dw = io.dw_blocks.mutable_data_ptr<float>() + block * io.dw_blocks.size(1);
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t t = first; t < last; ++t) layer_backward_row<T>(io, t, dw);
    });
  });
}

struct LayerNorm : torch::autograd::Function<LayerNorm> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x_any, const at::Tensor& weight,
                            const at::Tensor& bias, double eps) {
    const at::Tensor x = x_any.contiguous();
    at::Tensor y = at::empty_like(x), mean = at::empty({x.size(0)}, at::kFloat), rstd = at::empty_like(mean);
    const LayerForward io{x, weight, bias, eps, y, mean, rstd};
    with_element_type(x.scalar_type(), [&](auto element) { layer_rows<decltype(element)>(io); });
    ctx->save_for_backward({x, weight, mean, rstd});
    return y;
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor grad = grads[0].contiguous();
    const at::Tensor &x = saved[0], &weight = saved[1];
    at::Tensor dx = at::empty_like(x);
    at::Tensor dw_blocks = at::zeros({num_row_blocks(x.size(0)), 2 * x.size(1)}, at::kFloat);
    const LayerBackward io{grad, x, weight, saved[2], saved[3], dx, dw_blocks};
    with_element_type(x.scalar_type(), [&](auto element) { layer_backward<decltype(element)>(io); });
    const at::Tensor sums = dw_blocks.sum(0);
    return {dx, sums.slice(0, 0, x.size(1)), sums.slice(0, x.size(1)), {}};
  }
};

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  return LayerNorm::apply(x, weight, bias, eps);
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
