#include "kernels/cross_entropy.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/element_type.hpp"
#include "kernels/matrix_product.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

using simd::Float;
using simd::kLanes;

constexpr std::int64_t kChunkBytes = std::int64_t{128} << 20;  // of logits; each chunk reads and writes the whole weight gradient
constexpr std::int64_t kMaxChunkRows = 1024;

struct HeadOptionsHolder : torch::CustomClassHolder {
  explicit HeadOptionsHolder(HeadOptions given) : options(std::move(given)) {}
  HeadOptions options;
};

void check_labels(const at::Tensor& labels, std::int64_t classes) {
  const auto* label = labels.const_data_ptr<std::int64_t>();
  for (std::int64_t i = 0; i < labels.numel(); ++i)
    if (label[i] != kIgnoredLabel && (label[i] < 0 || label[i] >= classes))
      fail(ErrorKind::data, fmt::format("label {} at position {} of the batch is outside [0, {}) and is not {}",
                                        label[i], i, classes, kIgnoredLabel));
}

template <class T>
SHARDTUNE_INLINE Float load_logits(const T* row, std::int64_t at, std::int64_t width) {
  constexpr float kNone = -std::numeric_limits<float>::infinity();
  return width - at >= kLanes ? simd::load(row + at) : simd::load_some(row + at, width - at, kNone);
}

// Loss of one row; with `scale` the row is overwritten by its gradient times scale.
template <class T>
SHARDTUNE_INLINE double softmax_row(T* row, std::int64_t width, std::int64_t label, const float* scale) {
  Float largest = simd::broadcast(-std::numeric_limits<float>::infinity());
  for (std::int64_t at = 0; at < width; at += kLanes) {
    const Float x = load_logits(row, at, width);
    largest = x > largest ? x : largest;
  }
  float max = largest[0];
  for (std::int64_t i = 1; i < kLanes; ++i) max = std::max(max, largest[i]);
  double sum = 0;
  for (std::int64_t block = 0; block < width; block += 64 * kLanes) {  // short fp32 sums, long ones in double
    Float part{};
    for (std::int64_t at = block; at < std::min(width, block + 64 * kLanes); at += kLanes)
      part += simd::exp_non_positive(load_logits(row, at, width) - max);
    sum += simd::sum_lanes(part);
  }
  const double loss = std::log(sum) + static_cast<double>(max) - static_cast<double>(static_cast<float>(row[label]));
  if (scale == nullptr) return loss;
  const float target = static_cast<float>(row[label]) - max;
  const auto factor = static_cast<float>(static_cast<double>(*scale) / sum);
  for (std::int64_t at = 0; at < width; at += kLanes) {
    const Float g = simd::exp_non_positive(load_logits(row, at, width) - max) * factor;
    if (width - at >= kLanes)
      simd::store(row + at, g);
    else
      simd::store_some(row + at, g, width - at);
  }
  // p - 1 from the complement, so that a confident row keeps its digits.
  row[label] = static_cast<T>(static_cast<float>(std::expm1(static_cast<double>(target) - std::log(sum))) * *scale);
  return loss;
}

template <class T>
double softmax_rows(at::Tensor& logits, const std::int64_t* labels, const float* scale) {
  const std::int64_t rows = logits.size(0), width = logits.size(1);
  T* data = logits.mutable_data_ptr<T>();
  std::vector<double> losses(static_cast<std::size_t>(rows));
  at::parallel_for(0, rows, 8, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t r = begin; r < end; ++r)
        losses[static_cast<std::size_t>(r)] = softmax_row(data + r * width, width, labels[r], scale);
    });
  });
  double sum = 0;
  for (const double loss : losses) sum += loss;
  return sum;
}

struct HeadResult {
  double loss = 0;
  at::Tensor hidden_grad, weight_grad;
};

struct HeadInputs {
  const at::Tensor &hidden, &weight, &labels;
  bool wants_hidden_grad, wants_weight_grad;
};

HeadResult run_head(const HeadInputs& in, const HeadOptions& options) {
  HeadResult result;
  if (in.wants_hidden_grad) result.hidden_grad = at::zeros_like(in.hidden, at::MemoryFormat::Contiguous);
  if (in.wants_weight_grad) result.weight_grad = at::zeros(in.weight.sizes(), at::kFloat);
  const std::int64_t vocabulary = in.weight.size(0);
  const std::int64_t chunk = options.chunk_rows > 0
                                 ? options.chunk_rows
                                 : std::clamp<std::int64_t>(kChunkBytes / in.hidden.element_size() / vocabulary, 16, kMaxChunkRows);
  const at::Tensor rows = at::nonzero(in.labels != kIgnoredLabel).squeeze(1);
  const at::Tensor labels = in.labels.index_select(0, rows);
  const bool wants_grad = in.wants_hidden_grad || in.wants_weight_grad;
  const auto scale = static_cast<float>(options.loss_scale);
  for (std::int64_t begin = 0; begin < rows.numel(); begin += chunk) {
    const at::Tensor chunk_rows = rows.slice(0, begin, std::min(rows.numel(), begin + chunk));
    const at::Tensor hidden = in.hidden.index_select(0, chunk_rows);
    at::Tensor logits = matrix_product(hidden, in.weight.t());
    const auto* label = labels.const_data_ptr<std::int64_t>() + begin;
    with_element_type(logits.scalar_type(), [&](auto element) {
      result.loss += softmax_rows<decltype(element)>(logits, label, wants_grad ? &scale : nullptr);
    });
    if (in.wants_hidden_grad) result.hidden_grad.index_copy_(0, chunk_rows, matrix_product(logits, in.weight));
    if (in.wants_weight_grad) matrix_product_add(logits.t(), hidden, result.weight_grad);
  }
  return result;
}

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& labels, const c10::intrusive_ptr<HeadOptionsHolder>& holder) {
    HeadResult result =
        run_head({hidden, weight, labels, hidden.requires_grad(), weight.requires_grad()}, holder->options);
    ctx->saved_data["options"] = c10::IValue::make_capsule(holder);
    // Not inputs or outputs of the node: plain saved data, so that backward can take the buffers out and give them
    // away.
    ctx->saved_data["hidden_grad"] = std::move(result.hidden_grad);
    ctx->saved_data["weight_grad"] = std::move(result.weight_grad);
    return at::scalar_tensor(result.loss * holder->options.loss_scale, at::kFloat);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const auto take = [&](const char* key) {
      const auto it = ctx->saved_data.find(key);
      check_internal(it != ctx->saved_data.end(), "the fused head's backward can run once only");
      at::Tensor grad = std::move(it->second).toTensor();
      ctx->saved_data.erase(it);
      const double outer = grads[0].item<double>();
      if (grad.defined() && outer != 1.0) grad.mul_(outer);
      return grad;
    };
    at::Tensor hidden_grad = take("hidden_grad"), weight_grad = take("weight_grad");
    const auto capsule = ctx->saved_data["options"].toCapsule();
    if (auto& tied = static_cast<HeadOptionsHolder*>(capsule.get())->options.tied; tied && weight_grad.defined())
      tied->weight_grad = std::exchange(weight_grad, at::Tensor());
    return {hidden_grad, weight_grad, {}, {}};
  }
};

}  // namespace

at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels, double loss_scale) {
  const at::Tensor flat_labels = labels.contiguous();
  check_labels(flat_labels, logits.size(1));
  const at::Tensor sum = at::cross_entropy_loss(logits, flat_labels, {}, at::Reduction::Sum, kIgnoredLabel);
  return loss_scale == 1.0 ? sum : sum * loss_scale;
}

at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
                                    const HeadOptions& options) {
  check_internal(
      hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && labels.numel() == hidden.size(0),
      "the fused head takes hidden [T, D], weight [V, D] and labels [T]");
  const at::Tensor flat_labels = labels.contiguous();
  check_labels(flat_labels, weight.size(0));
  if (!at::GradMode::is_enabled() || !(hidden.requires_grad() || weight.requires_grad())) {
    const HeadResult result = run_head({hidden, weight, flat_labels, false, false}, options);
    return at::scalar_tensor(result.loss * options.loss_scale, at::kFloat);
  }
  return LinearCrossEntropy::apply(hidden, weight, flat_labels, c10::make_intrusive<HeadOptionsHolder>(options));
}

at::Tensor linear_cross_entropy_sum_reference(const at::Tensor& hidden, const at::Tensor& weight,
                                              const at::Tensor& labels, double loss_scale) {
  const at::Tensor logits = at::matmul(hidden, weight.t());
  return at::cross_entropy_loss(logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat), labels, {},
                                at::Reduction::Sum, kIgnoredLabel) *
         loss_scale;
}

}  // namespace shardtune
