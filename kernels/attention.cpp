#include "kernels/attention.hpp"

#include <algorithm>
#include <functional>
#include <limits>
#include <span>
#include <tuple>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/bf16_attention.hpp"
#include "kernels/bf16_gemm.hpp"
#include "kernels/short_attention.hpp"

namespace shardtune {
namespace {

using Offsets = std::vector<std::int64_t>;

// Largest block of fp32 probabilities of the dropout path, in elements (8 MiB).
constexpr std::int64_t kBlockElements = std::int64_t{2} << 20;

struct OptionsHolder : torch::CustomClassHolder {
  explicit OptionsHolder(const AttentionOptions& given)
      : options(given),
        keeps(given.recompute != nullptr && given.recompute->is_enabled() && !at::GradMode::is_enabled()),
        takes(given.recompute != nullptr && given.recompute->is_enabled() && at::GradMode::is_enabled()) {}
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
    if (end - begin <= kShortSegment) continue;
    const auto [o, lse] = at::_scaled_dot_product_flash_attention_for_cpu(
        segment(q, begin, end), segment(k, begin, end), segment(v, begin, end), 0.0, options.is_causal, {},
        options.scale);
    segment(out, begin, end).copy_(o);
    log_sum_exp.slice(0, begin, end).copy_(lse.squeeze(0).transpose(0, 1));
  }
}

// --- dropout path ------------------------------------------------------------------------------------------------

// One block of query rows of one key/value head with the query heads that share it.
struct Block {
  std::int64_t kv_head, heads_per_kv;
  std::int64_t segment_begin, row_begin, row_end, key_end;  // all positions in the packed row

  // [T, H, D] -> [heads_per_kv, rows, D] fp32
  at::Tensor queries(const at::Tensor& q) const {
    return q.slice(1, kv_head * heads_per_kv, (kv_head + 1) * heads_per_kv)
        .slice(0, row_begin, row_end)
        .transpose(0, 1)
        .to(at::kFloat);
  }
  // [T, K, D] -> [1, keys, D], broadcast over the query heads
  at::Tensor keys(const at::Tensor& k) const {
    return k.slice(1, kv_head, kv_head + 1).slice(0, segment_begin, key_end).transpose(0, 1);
  }
};

template <class F>
void for_each_block(const at::Tensor& q, const at::Tensor& k, const AttentionOptions& options, const F& visit) {
  const Offsets& offsets = *options.segment_offsets;
  const std::int64_t kv_heads = k.size(1), heads_per_kv = q.size(1) / kv_heads;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t begin = offsets[s], end = offsets[s + 1];
    if (end - begin <= kShortSegment) continue;
    const std::int64_t rows = std::max<std::int64_t>(1, kBlockElements / ((end - begin) * heads_per_kv));
    for (std::int64_t kv = 0; kv < kv_heads; ++kv)
      for (std::int64_t row = begin; row < end; row += rows) {
        const std::int64_t row_end = std::min(end, row + rows);
        visit(Block{kv, heads_per_kv, begin, row, row_end, options.is_causal ? row_end : end});
      }
  }
}

// softmax(q k^T) of a block, [heads_per_kv, rows, keys] fp32, before dropout.
at::Tensor probabilities(const at::Tensor& queries, const at::Tensor& keys, const Block& block,
                         const AttentionOptions& options) {
  at::Tensor scores = at::matmul(queries, keys.transpose(1, 2)).mul_(options.scale);
  if (options.is_causal && block.key_end > block.row_begin + 1) {
    const at::Tensor future =
        at::ones({block.row_end - block.row_begin, block.key_end - block.segment_begin}, at::kBool)
            .triu_(block.row_begin - block.segment_begin + 1);
    scores.masked_fill_(future, -std::numeric_limits<float>::infinity());
  }
  return at::softmax(scores, -1);
}

at::Tensor dropout_mask(const Block& block, const DropoutSite& site) {
  const std::int64_t rows = block.row_end - block.row_begin, keys = block.key_end - block.segment_begin;
  at::Tensor mask = at::empty({block.heads_per_kv, rows, keys}, at::kFloat);
  auto* into = mask.mutable_data_ptr<float>();
  const std::int64_t kv_heads_before = block.kv_head * block.heads_per_kv;
  at::parallel_for(0, block.heads_per_kv * rows, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i) {
      const std::int64_t head = kv_heads_before + i / rows, token = block.row_begin + i % rows;
      fill_dropout_row(site, dropout_row_of(token, head), std::span<float>(into + i * keys, static_cast<std::size_t>(keys)));
    }
  });
  return mask;
}

void dropout_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options,
                     at::Tensor& out) {
  for_each_block(q, k, options, [&](const Block& block) {
    at::Tensor p = probabilities(block.queries(q), block.keys(k).to(at::kFloat), block, options);
    p.mul_(dropout_mask(block, options.dropout));
    const at::Tensor o = at::matmul(p, block.keys(v).to(at::kFloat));
    out.slice(1, block.kv_head * block.heads_per_kv, (block.kv_head + 1) * block.heads_per_kv)
        .slice(0, block.row_begin, block.row_end)
        .copy_(o.transpose(0, 1));
  });
}

// Adds to d_k and d_v (zeroed, fp32: a key belongs to several blocks of query rows) and fills d_q.
void dropout_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                      const AttentionOptions& options, const AttentionGradients& into) {
  for_each_block(q, k, options, [&](const Block& block) {
    const at::Tensor queries = block.queries(q), d_out = block.queries(grad);
    const at::Tensor keys = block.keys(k).to(at::kFloat), values = block.keys(v).to(at::kFloat);
    const at::Tensor p = probabilities(queries, keys, block, options);
    const at::Tensor mask = dropout_mask(block, options.dropout);
    at::Tensor ds = at::matmul(d_out, values.transpose(1, 2)).mul_(mask);
    block.keys(into.v).add_(at::matmul((p * mask).transpose(1, 2), d_out).sum(0, true));
    ds = ds.sub_((ds * p).sum(-1, true)).mul_(p).mul_(options.scale);
    block.keys(into.k).add_(at::matmul(ds.transpose(1, 2), queries).sum(0, true));
    into.q.slice(1, block.kv_head * block.heads_per_kv, (block.kv_head + 1) * block.heads_per_kv)
        .slice(0, block.row_begin, block.row_end)
        .copy_(at::matmul(ds, keys).transpose(0, 1));
  });
}

void flash_backward(const at::Tensor& grad, const torch::autograd::variable_list& saved, const AttentionOptions& options,
                    const AttentionGradients& into) {
  const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2], &log_sum_exp = saved[3], &out = saved[4];
  const Offsets& offsets = *options.segment_offsets;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t begin = offsets[s], end = offsets[s + 1];
    if (end - begin <= kShortSegment) continue;
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

bool has_long_segment(const Offsets& offsets) {
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s)
    if (offsets[s + 1] - offsets[s] > kShortSegment) return true;
  return false;
}

void compute(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const AttentionOptions& options, at::Tensor& out,
             at::Tensor& log_sum_exp) {
  if (takes_bf16_products(q)) return bf16_attention_forward(q, k, v, options, out, log_sum_exp);
  short_attention_forward(q, k, v, options, out, log_sum_exp);
  if (!has_long_segment(*options.segment_offsets)) return;
  if (options.dropout.is_active())
    dropout_forward(q, k, v, options, out);
  else
    flash_forward(q, k, v, options, out, log_sum_exp);
}

void differentiate_long_segments(const at::Tensor& grad, const torch::autograd::variable_list& saved,
                                 const AttentionOptions& options, const AttentionGradients& into) {
  if (!options.dropout.is_active()) return flash_backward(grad, saved, options, into);
  at::Tensor wide_dk = at::zeros(into.k.sizes(), at::kFloat), wide_dv = at::zeros(into.v.sizes(), at::kFloat);
  dropout_backward(grad, saved[0], saved[1], saved[2], options, {into.q, wide_dk, wide_dv});
  into.k.copy_(wide_dk);
  into.v.copy_(wide_dv);
}

struct VarlenAttention : torch::autograd::Function<VarlenAttention> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& q_tracked, const at::Tensor& k_tracked,
                            const at::Tensor& v_tracked, const c10::intrusive_ptr<OptionsHolder>& holder) {
    // at::matmul folds batches differently when an operand requires a gradient, and then rounds differently: the forward
    // pass of recomputation, which runs without a graph, would have other bits.
    const at::Tensor q = q_tracked.detach(), k = k_tracked.detach(), v = v_tracked.detach();
    const AttentionOptions& options = holder->options;
    ctx->saved_data["options"] = c10::IValue::make_capsule(holder);
    const bool is_long = has_long_segment(*options.segment_offsets), has_dropout = options.dropout.is_active();
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
    torch::autograd::variable_list to_save{q, k, v, log_sum_exp};
    if (takes_bf16_products(q) || (is_long && !has_dropout)) to_save.push_back(out);
    ctx->save_for_backward(std::move(to_save));
    // The output itself goes on into the graph; what is kept must not be that very variable.
    if (holder->keeps) options.recompute->keep({out.detach(), log_sum_exp});
    return out;
  }

  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grad_outputs) {
    const auto saved = ctx->get_saved_variables();
    const at::Tensor &q = saved[0], &k = saved[1], &v = saved[2];
    const auto capsule = ctx->saved_data["options"].toCapsule();
    const AttentionOptions& options = static_cast<OptionsHolder*>(capsule.get())->options;
    const at::Tensor grad = grad_outputs[0].contiguous();
    at::Tensor dq = at::empty(q.sizes(), q.options()), dk = at::empty(k.sizes(), k.options()),
               dv = at::empty(v.sizes(), v.options());
    if (takes_bf16_products(q)) {
      bf16_attention_backward({q, k, v, saved[4], saved[3], grad}, options, {dq, dk, dv});
      return {dq, dk, dv, {}};
    }
    if (has_long_segment(*options.segment_offsets)) differentiate_long_segments(grad, saved, options, {dq, dk, dv});
    short_attention_backward(grad, q, k, v, saved[3], options, {dq, dk, dv});
    return {dq, dk, dv, {}};
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
}

}  // namespace

at::Tensor varlen_attention(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionOptions& options) {
  check(q, k, v, options);
  return VarlenAttention::apply(q, k, v, c10::make_intrusive<OptionsHolder>(options));
}

at::Tensor varlen_attention_reference(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                      const AttentionOptions& options) {
  check(q, k, v, options);
  const Offsets& offsets = *options.segment_offsets;
  const std::int64_t heads_per_kv = q.size(1) / k.size(1);
  std::vector<at::Tensor> outputs;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t begin = offsets[s], end = offsets[s + 1], n = end - begin;
    const at::Tensor qs = q.slice(0, begin, end).transpose(0, 1);
    const at::Tensor ks = k.slice(0, begin, end).transpose(0, 1).repeat_interleave(heads_per_kv, 0);
    const at::Tensor vs = v.slice(0, begin, end).transpose(0, 1).repeat_interleave(heads_per_kv, 0);
    at::Tensor scores = at::matmul(qs, ks.transpose(1, 2)) * options.scale;
    if (options.is_causal)
      scores = scores.masked_fill(at::ones({n, n}, at::kBool).triu(1), -std::numeric_limits<double>::infinity());
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
