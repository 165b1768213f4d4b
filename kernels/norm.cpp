#include "kernels/norm.hpp"

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

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
using simd::load_at;
using simd::store_at;

// Rows whose weight gradients are summed together; fixed, so that the bits do not depend on the number of threads.
constexpr std::int64_t kRowBlock = 64;

std::int64_t num_row_blocks(std::int64_t tokens) { return (tokens + kRowBlock - 1) / kRowBlock; }

// visit(block, first row, one past the last row)
template <class F>
void for_each_row_block(std::int64_t tokens, const F& visit) {
  at::parallel_for(0, num_row_blocks(tokens), 1, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block)
      visit(block, block * kRowBlock, std::min(tokens, (block + 1) * kRowBlock));
  });
}

// Sum of term(at, end) over the row's vectors; four running sums hide the latency of the adds.
template <class F>
SHARDTUNE_INLINE double sum_row(std::int64_t width, const F& term) {
  Float parts[4]{};
  std::int64_t at = 0;
  for (; at + 4 * kLanes <= width; at += 4 * kLanes)
    for (std::int64_t i = 0; i < 4; ++i) parts[i] += term(at + i * kLanes, at + (i + 1) * kLanes);
  simd::for_each_vector(width - at, [&](std::int64_t rest, std::int64_t end)
                                        SHARDTUNE_VECTOR_BODY { parts[0] += term(at + rest, at + end); });
  return simd::sum_lanes((parts[0] + parts[1]) + (parts[2] + parts[3]));
}

struct NormForward {
  at::Tensor x;             // the sum where there is one
  at::Tensor weight, bias;  // without a bias it is RMS norm
  double eps;
  at::Tensor y, mean, rstd;  // RMS norm has no mean
};

struct NormBackward {
  const at::Tensor &grad, &x, &weight, &mean, &rstd;
  at::Tensor dx;
  at::Tensor dw_blocks;  // [ceil(T / kRowBlock), D] fp32: of the weight; layer norm [.., 2 D], then of the bias
};

// --- RMS norm ----------------------------------------------------------------------------------------------------

template <class T>
SHARDTUNE_INLINE void rms_row(const NormForward& io, std::int64_t t) {
  const std::int64_t width = io.x.size(1);
  const T *x = io.x.const_data_ptr<T>() + t * width, *w = io.weight.const_data_ptr<T>();
  T* y = io.y.mutable_data_ptr<T>() + t * width;
  const double squares = sum_row(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    const Float value = load_at(x, at, end);
    return value * value;
  });
  const auto inverse = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + io.eps));
  io.rstd.mutable_data_ptr<float>()[t] = inverse;
  simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    store_at(y, at, end, load_at(x, at, end) * inverse * load_at(w, at, end));
  });
}

template <class T>
SHARDTUNE_INLINE void rms_backward_row(const NormBackward& io, std::int64_t t, float* dw) {
  const std::int64_t width = io.x.size(1);
  const T *g = io.grad.const_data_ptr<T>() + t * width, *x = io.x.const_data_ptr<T>() + t * width;
  const T* w = io.weight.const_data_ptr<T>();
  T* dx = io.dx.mutable_data_ptr<T>() + t * width;
  const float inverse = io.rstd.const_data_ptr<float>()[t];
  Float dots{};
  simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    const Float normalised = load_at(x, at, end) * inverse, gv = load_at(g, at, end);
    dots += gv * load_at(w, at, end) * normalised;
    store_at(dw, at, end, load_at(dw, at, end) + gv * normalised);
  });
  const auto mean = static_cast<float>(simd::sum_lanes(dots) / static_cast<double>(width));
  simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    const Float normalised = load_at(x, at, end) * inverse;
    store_at(dx, at, end, (load_at(g, at, end) * load_at(w, at, end) - normalised * mean) * inverse);
  });
}

// --- layer norm --------------------------------------------------------------------------------------------------

// Mean first, then the squares of what is left: no cancellation however large the mean.
template <class T>
SHARDTUNE_INLINE void layer_row(const NormForward& io, std::int64_t t) {
  const std::int64_t width = io.x.size(1);
  const T *x = io.x.const_data_ptr<T>() + t * width, *w = io.weight.const_data_ptr<T>();
  const T* b = io.bias.const_data_ptr<T>();
  T* y = io.y.mutable_data_ptr<T>() + t * width;
  const double sum =
      sum_row(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY { return load_at(x, at, end); });
  const auto mean = static_cast<float>(sum / static_cast<double>(width));
  const double squares = sum_row(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    Float centred = load_at(x, at, end) - mean;
    for (std::int64_t lane = end - at; lane < kLanes; ++lane) centred[lane] = 0.0F;
    return centred * centred;
  });
  const auto rstd = static_cast<float>(1.0 / std::sqrt(squares / static_cast<double>(width) + io.eps));
  io.mean.mutable_data_ptr<float>()[t] = mean;
  io.rstd.mutable_data_ptr<float>()[t] = rstd;
  simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    store_at(y, at, end, (load_at(x, at, end) - mean) * rstd * load_at(w, at, end) + load_at(b, at, end));
  });
}

template <class T>
SHARDTUNE_INLINE void layer_backward_row(const NormBackward& io, std::int64_t t, float* dw) {
  const std::int64_t width = io.x.size(1);
  const T *g = io.grad.const_data_ptr<T>() + t * width, *x = io.x.const_data_ptr<T>() + t * width;
  const T* w = io.weight.const_data_ptr<T>();
  T* dx = io.dx.mutable_data_ptr<T>() + t * width;
  float* db = dw + width;
  const float mean = io.mean.const_data_ptr<float>()[t], rstd = io.rstd.const_data_ptr<float>()[t];
  Float sums{}, dots{};
  // lanes beyond the row hold g = 0
  simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    const Float normalised = (load_at(x, at, end) - mean) * rstd, gv = load_at(g, at, end);
    const Float gw = gv * load_at(w, at, end);
    sums += gw;
    dots += gw * normalised;
    store_at(dw, at, end, load_at(dw, at, end) + gv * normalised);
    store_at(db, at, end, load_at(db, at, end) + gv);
  });
  const auto sum = static_cast<float>(simd::sum_lanes(sums) / static_cast<double>(width));
  const auto dot = static_cast<float>(simd::sum_lanes(dots) / static_cast<double>(width));
  simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    const Float normalised = (load_at(x, at, end) - mean) * rstd;
    store_at(dx, at, end, (load_at(g, at, end) * load_at(w, at, end) - sum - normalised * dot) * rstd);
  });
}

// --- the sum before the norm ---------------------------------------------------------------------------------------

// The dropout multipliers of a row of the branch.
class RowMask {
 public:
  RowMask(const DropoutSite& site, std::int64_t width)
      : site_(site), mask_(static_cast<std::size_t>(site.is_active() ? width : 0)) {}
  // Until the next call; null when off.
  const float* of_row(std::int64_t t) {
    if (mask_.empty()) return nullptr;
    fill_dropout_row(site_, 0, mask_, static_cast<std::uint64_t>(t) * mask_.size());
    return mask_.data();
  }

 private:
  DropoutSite site_;
  std::vector<float> mask_;
};

// As dropout() rounds and drops; mask: null = off.
template <class T>
SHARDTUNE_INLINE Float masked(const Float& x, const float* mask, std::int64_t at, std::int64_t width) {
  if (mask == nullptr) return x;
  const Float m = load_at(mask, at, width);
  return m != 0.0F ? simd::rounded_to<T>(x * m) : Float{};
}

template <class T>
SHARDTUNE_INLINE void add_row(const ResidualAdd& add, const float* mask, const at::Tensor& sum, std::int64_t t) {
  const std::int64_t width = sum.size(1), first = t * width;
  const T *residual = add.residual.const_data_ptr<T>() + first, *branch = add.branch.const_data_ptr<T>() + first;
  T* out = sum.mutable_data_ptr<T>() + first;
  simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    store_at(out, at, end, load_at(residual, at, end) + masked<T>(load_at(branch, at, end), mask, at, end));
  });
}

// Where the gradient goes on behind the norm.
struct AddBackward {
  at::Tensor sum_grad;  // of the sum as a result; undefined = none
  at::Tensor dbranch;   // undefined = dx, where nothing is dropped
  DropoutSite dropout;
};

template <class T>
SHARDTUNE_INLINE void add_backward_row(const AddBackward& add, const float* mask, const at::Tensor& dx,
                                       std::int64_t t) {
  const std::int64_t width = dx.size(1), first = t * width;
  T* total = dx.mutable_data_ptr<T>() + first;
  if (add.sum_grad.defined()) {
    const T* grad = add.sum_grad.const_data_ptr<T>() + first;
    simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
      store_at(total, at, end, load_at(total, at, end) + load_at(grad, at, end));
    });
  }
  if (mask == nullptr) return;
  T* dbranch = add.dbranch.mutable_data_ptr<T>() + first;
  simd::for_each_vector(width, [&](std::int64_t at, std::int64_t end) SHARDTUNE_VECTOR_BODY {
    store_at(dbranch, at, end, masked<T>(load_at(total, at, end), mask, at, end));
  });
}

// --- rows and autograd -------------------------------------------------------------------------------------------

// A row stays in the first-level cache from the sum to the normalised values.
template <class T>
void run_rows(const NormForward& io, const ResidualAdd& add) {
  at::parallel_for(0, io.x.size(0), 16, [&](std::int64_t begin, std::int64_t end) {
    RowMask mask(add.dropout, io.x.size(1));
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t t = begin; t < end; ++t) {
        if (add.branch.defined()) add_row<T>(add, mask.of_row(t), io.x, t);
        if (io.bias.defined())
          layer_row<T>(io, t);
        else
          rms_row<T>(io, t);
      }
    });
  });
}

template <class T>
void run_rows_backward(const NormBackward& io, const AddBackward& add) {
  for_each_row_block(io.x.size(0), [&](std::int64_t block, std::int64_t first, std::int64_t last) {
    float* dw = io.dw_blocks.mutable_data_ptr<float>() + block * io.dw_blocks.size(1);
    RowMask mask(add.dropout, io.x.size(1));
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t t = first; t < last; ++t) {
        if (io.mean.defined())
          layer_backward_row<T>(io, t, dw);
        else
          rms_backward_row<T>(io, t, dw);
        add_backward_row<T>(add, mask.of_row(t), io.dx, t);
      }
    });
  });
}

struct NormOptions {
  double eps;
  DropoutSite dropout = {};
};

// Results: y, and the sum where there is a branch to add to x.
struct Norm : torch::autograd::Function<Norm> {
  using Context = torch::autograd::AutogradContext;
  using Tensors = torch::autograd::variable_list;
  using Optional = std::optional<at::Tensor>;  // a Function takes no undefined tensor

  static Tensors forward(Context* ctx, const at::Tensor& x_any, const Optional& branch, const at::Tensor& weight,
                         const Optional& bias, const NormOptions& options) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const at::Tensor x = x_any.contiguous();
    const ResidualAdd add{x, branch ? branch->contiguous() : at::Tensor(), options.dropout};
    const NormForward io{branch ? at::empty_like(x) : x,
                         weight,
                         bias.value_or(at::Tensor()),
                         options.eps,
                         at::empty_like(x),
                         bias ? at::empty({x.size(0)}, at::kFloat) : at::Tensor(),
                         at::empty({x.size(0)}, at::kFloat)};
    with_element_type(x.scalar_type(), [&](auto element) { run_rows<decltype(element)>(io, add); });
    ctx->save_for_backward({io.x, weight, io.mean, io.rstd});
    ctx->saved_data["probability"] = options.dropout.probability;
    ctx->saved_data["key"] = static_cast<std::int64_t>(options.dropout.key);
    ctx->set_materialize_grads(false);  // the sum is often a result that nobody takes
    return branch ? Tensors{io.y, io.x} : Tensors{io.y};
  }

  static Tensors backward(Context* ctx, const Tensors& grads) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const Tensors saved = ctx->get_saved_variables();
    const at::Tensor &x = saved[0], &mean = saved[2];
    const at::Tensor grad = grads[0].defined() ? grads[0].contiguous() : at::zeros_like(x);
    const bool has_branch = grads.size() > 1;
    AddBackward add{has_branch && grads[1].defined() ? grads[1].contiguous() : at::Tensor(),
                    {},
                    {.probability = ctx->saved_data["probability"].toDouble(),
                     .key = static_cast<std::uint64_t>(ctx->saved_data["key"].toInt())}};
    if (add.dropout.is_active()) add.dbranch = at::empty_like(x);
    const std::int64_t width = x.size(1), sums_width = mean.defined() ? 2 * width : width;
    const NormBackward io{grad,
                          x,
                          saved[1],
                          mean,
                          saved[3],
                          at::empty_like(x),
                          at::zeros({num_row_blocks(x.size(0)), sums_width}, at::kFloat)};
    with_element_type(x.scalar_type(), [&](auto element) { run_rows_backward<decltype(element)>(io, add); });
    const at::Tensor sums = io.dw_blocks.sum(0);
    Tensors result{io.dx, {}, mean.defined() ? sums.slice(0, 0, width) : sums, {}, {}};
    if (has_branch) result[1] = add.dropout.is_active() ? add.dbranch : io.dx;
    if (mean.defined()) result[3] = sums.slice(0, width);
    return result;
  }
};

NormedSum run_sum(const ResidualAdd& add, const at::Tensor& weight, const Norm::Optional& bias, double eps) {
  check_internal(add.residual.sizes() == add.branch.sizes() && add.residual.scalar_type() == add.branch.scalar_type(),
                 "a residual and its branch must be of one shape and dtype");
  const auto results =
      Norm::apply(add.residual, Norm::Optional(add.branch), weight, bias, NormOptions{eps, add.dropout});
  return {.normed = results[0], .sum = results[1]};
}

}  // namespace

at::Tensor layer_norm(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  return Norm::apply(x, std::nullopt, weight, Norm::Optional(bias), NormOptions{.eps = eps})[0];
}

at::Tensor layer_norm_reference(const at::Tensor& x, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  const at::Tensor centred = wide - wide.mean(-1, true);
  const at::Tensor y = centred * at::rsqrt(centred.square().mean(-1, true) + eps);
  return (y * weight + bias).to(x.scalar_type());
}

at::Tensor rms_norm(const at::Tensor& x, const at::Tensor& weight, double eps) {
  return Norm::apply(x, std::nullopt, weight, std::nullopt, NormOptions{.eps = eps})[0];
}

at::Tensor rms_norm_reference(const at::Tensor& x, const at::Tensor& weight, double eps) {
  const at::Tensor wide = x.scalar_type() == at::kDouble ? x : x.to(at::kFloat);
  return (wide * at::rsqrt(wide.square().mean(-1, true) + eps) * weight).to(x.scalar_type());
}

NormedSum add_layer_norm(const ResidualAdd& add, const at::Tensor& weight, const at::Tensor& bias, double eps) {
  return run_sum(add, weight, bias, eps);
}

NormedSum add_rms_norm(const ResidualAdd& add, const at::Tensor& weight, double eps) {
  return run_sum(add, weight, std::nullopt, eps);
}

}  // namespace shardtune
