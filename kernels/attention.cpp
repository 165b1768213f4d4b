#include "kernels/attention.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <optional>
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/attention_hooks.hpp"
#include "kernels/bf16_attention.hpp"
#include "kernels/bf16_gemm.hpp"
#include "kernels/blocked_attention.hpp"
#include "kernels/short_attention.hpp"

namespace shardtune {
namespace {

using Offsets = std::vector<std::int64_t>;

// ATen's kernel knows neither dropout nor what has_hooks names.
bool takes_flash(const AttentionOptions& options, std::int64_t length) {
  return length > kShortSegment && !takes_blocks(options, length);
}

struct OptionsHolder : torch::CustomClassHolder {
  explicit OptionsHolder(const AttentionOptions& given)
      : options(given),
        keeps(given.recompute != nullptr && given.recompute->is_enabled() && !at::GradMode::is_enabled()),
        takes(given.recompute != nullptr && given.recompute->is_enabled() && at::GradMode::is_enabled()) {
    options.relative_bias.reset();  // saved as autograd saves tensors
  }
  AttentionOptions options;
  bool keeps, takes;  // the first pass of a unit and its recomputation (inside of a Function grad mode is always off)
};

// Rows [begin, end) of [T, heads, D] as the [1, heads, n, D] view that ATen's kernels take.
at::Tensor segment(const at::Tensor& x, std::int64_t begin, std::int64_t end) {
  return x.slice(0, begin, end).transpose(0, 1).unsqueeze(0);
}

void flash_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options,
                   at::Tensor& out, at::Tensor& log_sum_exp) {
  const Offsets& offsets = *options.segment_offsets;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t begin = offsets[s], end = offsets[s + 1];
    if (!takes_flash(options, end - begin)) continue;
    const auto [o, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        segment(q, begin, end), segment(k, begin, end), segment(v, begin, end), 0.0, options.is_causal, {},
        options.scale);
    segment(out, begin, end).copy_(o);
    log_sum_exp.slice(0, begin, end).copy_(lse.squeeze(0).transpose(0, 1));
  }
}

void flash_backward(const at::Tensor& grad, const torch::autograd::variable_list& saved, const AttentionOptions& options,
                    const AttentionGradients& into) {
  const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &log_sum_exp = saved[3], &out = saved[4];
  const Offsets& offsets = *options.segment_offsets;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t begin = offsets[s], end = offsets[s + 1];
    if (!takes_flash(options, end - begin)) continue;
    const auto [gq, gk, gv] = at::_scaled_dot_product_flash_attention_for_cpu_backward(
        segment(grad, begin, end), segment(q, begin, end), segment(k, begin, end), segment(v, begin, end),
        segment(out, begin, end), segment(log_sum_exp.unsqueeze(-1), begin, end).squeeze(-1), 0.0, options.is_causal,
        {}, options.scale);
    segment(into.q, begin, end).copy_(gq);
    segment(into.k, begin, end).copy_(gk);
    segment(into.v, begin, end).copy_(gv);
  }
}

// -----------------------------------------------------------------------------------------------------------------

bool any_segment(const AttentionOptions& options, bool (*is_it)(const AttentionOptions&, std::int64_t)) {
  const Offsets& offsets = *options.segment_offsets;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    if (is_it(options, offsets[s + 1] - offsets[s])) return true;
  return false;
}

void compute(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options, at::Tensor& out,
             at::Tensor& log_sum_exp) {
  if (takes_bf16_products(q)) return bf16_attention_forward(q, k, v, options, out, log_sum_exp);
  short_attention_forward(q, k, v, options, out, log_sum_exp);
  blocked_attention_forward(q, k, v, options, out);
  flash_forward(q, k, v, options, out, log_sum_exp);
}

void differentiate(const at::Tensor& grad, const torch::autograd::variable_list& saved, const AttentionOptions& options,
                   const AttentionGradients& into) {
  const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &log_sum_exp = saved[3], &out = saved[4];
  if (takes_bf16_products(q)) return bf16_attention_backward({q, k, v, out, log_sum_exp, grad}, options, into);
  if (any_segment(options, takes_blocks)) blocked_attention_backward(grad, q, k, v, options, into);
  flash_backward(grad, saved, options, into);
  short_attention_backward(grad, q, k, v, log_sum_exp, options, into);
}

struct VarlenAttention : torch::autograd::Function<VarlenAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q_tracked,
                            const at::Tensor& k_tracked, const at::Tensor& v_tracked,
                            const std::optional<at::Tensor>& bias_tracked,
                            const c10::intrusive_ptr<OptionsHolder>& holder) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    // ATen's operators may go another way, with other roundings, when an operand requires a gradient: the forward pass
    // of recomputation, which runs without a graph, would have other bits.
    const at::Tensor q = q_tracked.detach(), k = k_tracked.detach(), v = v_tracked.detach();
    AttentionOptions options = holder->options;
    if (bias_tracked.has_value()) options.relative_bias = bias_tracked->detach();
    ctx->saved_data["options"] = c10::IValue::make_capsule(holder);
    at::Tensor out, log_sum_exp;
    if (holder->takes) {
      auto kept = options.recompute->take();
      out = kept[0];
      log_sum_exp = kept[1];
    } else {
      out = at::empty({q.size(0), q.size(1), q.size(2)}, q.options());
      log_sum_exp = at::empty({q.size(0), q.size(1)}, q.options().dtype(at::kFloat));
      compute(q, k, v, options, out, log_sum_exp);
    }
    const bool needs_out = takes_bf16_products(q) || any_segment(options, takes_flash);
    ctx->save_for_backward({q, k, v, log_sum_exp, needs_out ? out : at::Tensor(), options.relative_bias});
    // The output itself goes on into the graph; what is kept must not be that very variable.
    if (holder->keeps) options.recompute->keep({out.detach(), log_sum_exp});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grad_outputs) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1];
    const auto capsule = ctx->saved_data["options"].toCapsule();
    AttentionOptions options = static_cast<OptionsHolder*>(capsule.get())->options;
    const at::Tensor& bias = options.relative_bias = saved[5];
    const at::Tensor grad = grad_outputs[0].contiguous();
    // Side by side, as a model that made q, k and v by one product wants them (side_by_side.hpp).
    const at::Tensor all = at::empty({q.size(0), q.size(1) + 2 * k.size(1), q.size(2)}, q.options());
    at::Tensor dq = all.narrow(1, 0, q.size(1)), dk = all.narrow(1, q.size(1), k.size(1)),
               dv = all.narrow(1, q.size(1) + k.size(1), k.size(1));
    if (!bias.defined()) {
      differentiate(grad, saved, options, {dq, dk, dv});
      return {dq, dk, dv, {}, {}};
    }
    at::Tensor sums = make_diagonal_sums(q.size(1), q.size(0));
    differentiate(grad, saved, options, {dq, dk, dv, &sums});
    return {dq, dk, dv, sum_over_segments(sums, *options.segment_offsets, bias.size(1)), {}};
  }
};

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options) {
  check_internal(
      q.dim() == 3 && k.dim() == 3 && v.sizes() == k.sizes() && q.size(0) == k.size(0) && q.size(2) == k.size(2),
      "attention takes q [T, H, D], k and v [T, K, D]");
  check_internal(q.size(1) % k.size(1) == 0, "query heads must be a multiple of key/value heads");
  const Offsets* offsets = options.segment_offsets.get();
  check_internal(offsets != nullptr && offsets->size() >= 2 && offsets->front() == 0 && offsets->back() == q.size(0) &&
                     std::adjacent_find(offsets->begin(), offsets->end(), std::greater_equal<>()) == offsets->end(),
                 "segment offsets must cover the row and increase strictly");
  check_internal(options.scale > 0, "attention's scale must be positive");
  if (options.window < 0)
    fail(ErrorKind::internal,
         fmt::format("attention's window is {}, it must be positive, or 0 for none", options.window));
  if (!(options.soft_cap >= 0) || !std::isfinite(options.soft_cap))
    fail(ErrorKind::internal,
         fmt::format("attention's soft_cap is {}, it must be positive, or 0 for none", options.soft_cap));
}

std::int64_t longest_segment(const Offsets& offsets) {
  std::int64_t longest = 0;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) longest = std::max(longest, offsets[s + 1] - offsets[s]);
  return longest;
}

void check_bias(const at::Tensor& bias, std::int64_t num_heads, const Offsets& offsets) {
  if (!bias.defined()) return;
  const std::int64_t least = 2 * longest_segment(offsets) - 1;
  if (bias.dim() != 2 || bias.size(0) != num_heads || bias.size(1) % 2 == 0 || bias.size(1) < least)
    fail(ErrorKind::internal,
         fmt::format(
             "attention's relative_bias is {}, it must be [{} heads, an odd number of distances, at least {} for "
             "the longest segment]",
             fmt::join(bias.sizes(), " x "), num_heads, least));
}

}  // namespace

at::Tensor varlen_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionOptions& options) {
  check(q, k, v, options);
  const at::Tensor& bias = options.relative_bias;
  check_bias(bias, q.size(1), *options.segment_offsets);
  check_internal(!bias.defined() || bias.scalar_type() == at::kFloat, "attention's relative_bias must be fp32");
  return VarlenAttention::apply(q, k, v, bias.defined() ? std::optional(bias) : std::nullopt,
                                c10::make_intrusive<OptionsHolder>(options));
}

at::Tensor varlen_attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const AttentionOptions& options) {
  check(q, k, v, options);
  check_bias(options.relative_bias, q.size(1), *options.segment_offsets);
  const Offsets& offsets = *options.segment_offsets;
  const std::int64_t heads_per_kv = q.size(1) / k.size(1);
  std::vector<at::Tensor> outputs;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t begin = offsets[s], end = offsets[s + 1], n = end - begin;
    const at::Tensor qs = q.slice(0, begin, end).transpose(0, 1);
    const at::Tensor ks = k.slice(0, begin, end).transpose(0, 1).repeat_interleave(heads_per_kv, 0);
    const at::Tensor vs = v.slice(0, begin, end).transpose(0, 1).repeat_interleave(heads_per_kv, 0);
    at::Tensor scores = at::matmul(qs, ks.transpose(1, 2)) * options.scale;
    if (options.soft_cap > 0) scores = at::tanh(scores / options.soft_cap) * options.soft_cap;
    const at::Tensor distance = at::arange(n) - at::arange(n).unsqueeze(1);
    if (options.relative_bias.defined()) {
      const at::Tensor entry = distance + (options.relative_bias.size(1) - 1) / 2;
      scores = scores + options.relative_bias.index_select(1, entry.flatten()).view_as(scores).to(scores.scalar_type());
    }
    at::Tensor hidden = at::zeros({n, n}, at::kBool);
    if (options.is_causal) hidden = hidden | (distance > 0);
    // transformers: sliding_window_overlay and sliding_window_bidirectional_overlay of masking_utils.py.
    if (options.window > 0)
      hidden = hidden | (options.is_causal ? distance <= -options.window : distance.abs() > options.window);
    scores = scores.masked_fill(hidden, -std::numeric_limits<double>::infinity());
    at::Tensor p = at::softmax(scores, -1);
    if (options.dropout.is_active()) {
      at::Tensor mask = at::empty({q.size(1), n, n}, at::kFloat);
      for (std::int64_t h = 0; h < q.size(1); ++h)
        for (std::int64_t i = 0; i < n; ++i)
          for (std::int64_t j = 0; j < n; ++j)
            mask[h][i][j] = dropout_multiplier(options.dropout, dropout_row_of(begin + i, h), static_cast<std::uint64_t>(j));
      p = p * mask.to(p.scalar_type());
    }
    outputs.push_back(at::matmul(p, vs).transpose(0, 1));
  }
  return at::cat(outputs);
}

}  // namespace shardtune
