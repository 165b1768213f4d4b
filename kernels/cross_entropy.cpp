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
#include "kernels/bf16_gemm.hpp"
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

// Lanes beyond the row's end count for nothing.
template <class T>
SHARDTUNE_INLINE Float load_logits(const T* row, std::int64_t at, std::int64_t width) {
  return simd::load_at(row, at, width, -std::numeric_limits<float>::infinity());
}

// What becomes of a row of logits.
struct RowLoss {
  double smoothing;    // share of the target that is spread evenly over all classes
  const float* scale;  // of the gradient; null = only the loss is wanted
};

// Loss of one row; with a scale the row is overwritten by its gradient times that. kIsSmoothed: whether smoothing > 0.
template <bool kIsSmoothed, class T>
SHARDTUNE_INLINE double softmax_row(T* row, std::int64_t width, std::int64_t label, const RowLoss& how) {
  Float largest = simd::broadcast(-std::numeric_limits<float>::infinity());
  for (std::int64_t at = 0; at < width; at += kLanes) {
    const Float x = load_logits(row, at, width);
    largest = x > largest ? x : largest;
  }
  float max = largest[0];
  for (std::int64_t i = 1; i < kLanes; ++i) max = std::max(max, largest[i]);
  // Of e^(x - max), and of x - max itself.
  double sum = 0, distance = 0;
  for (std::int64_t block = 0; block < width; block += 64 * kLanes) {  // short fp32 sums, long ones in double
    Float part{}, distance_part{};
    for (std::int64_t at = block; at < std::min(width, block + 64 * kLanes); at += kLanes) {
      part += simd::exp_non_positive(load_logits(row, at, width) - max);
      if constexpr (kIsSmoothed) distance_part += simd::load_at(row, at, width, max) - max;
    }
    sum += simd::sum_lanes(part);
    if constexpr (kIsSmoothed) distance += simd::sum_lanes(distance_part);
  }
  double loss = std::log(sum) + static_cast<double>(max) - static_cast<double>(static_cast<float>(row[label]));
  if constexpr (kIsSmoothed)
    loss = (1 - how.smoothing) * loss + how.smoothing * (std::log(sum) - distance / static_cast<double>(width));
  if (how.scale == nullptr) return loss;
  const float target = static_cast<float>(row[label]) - max;
  const auto factor = static_cast<float>(static_cast<double>(*how.scale) / sum);
  const double share = how.smoothing / static_cast<double>(width);  // of each class in the target
  const auto scaled_share = static_cast<float>(static_cast<double>(*how.scale) * share);
  for (std::int64_t at = 0; at < width; at += kLanes) {
    Float g = simd::exp_non_positive(load_logits(row, at, width) - max) * factor;
    if constexpr (kIsSmoothed) g -= scaled_share;
    simd::store_at(row, at, width, g);
  }
  // p - 1 from the complement, so that a confident row keeps its digits.
  double label_gradient = std::expm1(static_cast<double>(target) - std::log(sum));
  if constexpr (kIsSmoothed) label_gradient += how.smoothing - share;
  row[label] = static_cast<T>(static_cast<float>(label_gradient) * *how.scale);
  return loss;
}

template <bool kIsSmoothed, class T>
double softmax_rows(at::Tensor& logits, const std::int64_t* labels, const RowLoss& how) {
  const std::int64_t rows = logits.size(0), width = logits.size(1), stride = logits.stride(0);
  T* data = logits.mutable_data_ptr<T>();
  std::vector<double> losses(static_cast<std::size_t>(rows));
  at::parallel_for(0, rows, 8, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t r = begin; r < end; ++r)
        losses[static_cast<std::size_t>(r)] = softmax_row<kIsSmoothed>(data + r * stride, width, labels[r], how);
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
  const RowLoss how{.smoothing = options.label_smoothing, .scale = wants_grad ? &scale : nullptr};
  for (std::int64_t begin = 0; begin < rows.numel(); begin += chunk) {
    const at::Tensor chunk_rows = rows.slice(0, begin, std::min(rows.numel(), begin + chunk));
    const at::Tensor hidden = in.hidden.index_select(0, chunk_rows);
    at::Tensor logits =
        takes_bf16_products(hidden) ? bf16_gemm_aligned(hidden, in.weight.t()) : matrix_product(hidden, in.weight.t());
    const auto* label = labels.const_data_ptr<std::int64_t>() + begin;
    with_element_type(logits.scalar_type(), [&](auto element) {
      using T = decltype(element);
      result.loss +=
          how.smoothing > 0 ? softmax_rows<true, T>(logits, label, how) : softmax_rows<false, T>(logits, label, how);
    });
    if (in.wants_hidden_grad) result.hidden_grad.index_copy_(0, chunk_rows, matrix_product(logits, in.weight));
    if (in.wants_weight_grad) matrix_product_add(logits.t(), hidden, result.weight_grad);
  }
  return result;
}

struct LinearCrossEntropy : torch::autograd::Function<LinearCrossEntropy> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& hidden, const at::Tensor& weight,
                            const at::Tensor& labels, const c10::intrusive_ptr<HeadOptionsHolder>& holder) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
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
    const at::AutoDispatchBelowADInplaceOrView untracked;
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

at::Tensor cross_entropy_sum(const at::Tensor& logits, const at::Tensor& labels, double loss_scale,
                             double label_smoothing) {
  const at::Tensor flat_labels = labels.contiguous();
  check_labels(flat_labels, logits.size(1));
  const at::Tensor sum =
      at::cross_entropy_loss(logits, flat_labels, {}, at::Reduction::Sum, kIgnoredLabel, label_smoothing);
  return loss_scale == 1.0 ? sum : sum * loss_scale;
}

at::Tensor linear_cross_entropy_sum(const at::Tensor& hidden, const at::Tensor& weight, const at::Tensor& labels,
                                    const HeadOptions& options) {
  check_internal(
      hidden.dim() == 2 && weight.dim() == 2 && hidden.size(1) == weight.size(1) && labels.numel() == hidden.size(0),
      "the fused head takes hidden [T, D], weight [V, D] and labels [T]");
  check_internal(options.label_smoothing >= 0 && options.label_smoothing <= 1,
                 "label smoothing is a share from 0 to 1");
  const at::Tensor flat_labels = labels.contiguous();
  check_labels(flat_labels, weight.size(0));
  if (!at::GradMode::is_enabled() || !(hidden.requires_grad() || weight.requires_grad())) {
    const HeadResult result = run_head({hidden, weight, flat_labels, false, false}, options);
    return at::scalar_tensor(result.loss * options.loss_scale, at::kFloat);
  }
  return LinearCrossEntropy::apply(hidden, weight, flat_labels, c10::make_intrusive<HeadOptionsHolder>(options));
}

at::Tensor linear_cross_entropy_sum_reference(const at::Tensor& hidden, const at::Tensor& weight,
                                              const at::Tensor& labels, double loss_scale, double label_smoothing) {
  const at::Tensor logits = at::matmul(hidden, weight.t());
  return at::cross_entropy_loss(logits.scalar_type() == at::kDouble ? logits : logits.to(at::kFloat), labels, {},
                                at::Reduction::Sum, kIgnoredLabel, label_smoothing) *
         loss_scale;
}

}  // namespace shardtune
