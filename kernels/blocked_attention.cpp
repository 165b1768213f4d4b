#include "kernels/blocked_attention.hpp"

#include <algorithm>
#include <limits>
#include <span>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "kernels/attention_hooks.hpp"
#include "kernels/matrix_product.hpp"

namespace shardtune {
namespace {

// Largest block of fp32 probabilities, in elements (8 MiB).
constexpr std::int64_t kBlockElements = std::int64_t{2} << 20;
// With a window, a block of fewer rows than that is mostly overhead.
constexpr std::int64_t kFewestRows = 64;

// One block of query rows of one key/value head with the query heads that share it.
struct Block {
  std::int64_t kv_head, heads_per_kv;
  std::int64_t segment_begin, segment_end, row_begin, row_end, key_begin, key_end;  // all positions in the packed row

  std::int64_t rows() const { return row_end - row_begin; }
  std::int64_t keys() const { return key_end - key_begin; }
  // [T, H, D] -> [heads_per_kv, rows, D], a view
  at::Tensor rows_of(const at::Tensor& q) const {
    return q.slice(1, kv_head * heads_per_kv, (kv_head + 1) * heads_per_kv)
        .slice(0, row_begin, row_end)
        .transpose(0, 1);
  }
  // [T, K, D] -> [keys, D], a view
  at::Tensor keys_of(const at::Tensor& k) const { return k.select(1, kv_head).slice(0, key_begin, key_end); }
  // Operands of products in fp32: all rows of all heads under each other, [heads_per_kv * rows, D], and the keys.
  at::Tensor all_rows_of(const at::Tensor& q) const { return rows_of(q).to(at::kFloat).reshape({-1, q.size(2)}); }
  at::Tensor wide_keys_of(const at::Tensor& k) const { return keys_of(k).to(at::kFloat); }
  // [heads_per_kv, rows, n] -> [heads_per_kv * rows, n] and back
  static at::Tensor flat(const at::Tensor& by_head) { return by_head.view({-1, by_head.size(2)}); }
  at::Tensor by_head(const at::Tensor& all) const { return all.view({heads_per_kv, rows(), all.size(1)}); }
};

std::int64_t rows_of_block(const Reach& reach, std::int64_t length, std::int64_t heads_per_kv) {
  std::int64_t keys = length, most = length;
  if (reach.behind < length - 1) {  // a window: few rows beside the keys in reach of one, most pairs of which are seen
    most = std::max(kFewestRows, (reach.behind + reach.ahead + 1) / 4);
    keys = std::min(length, most + reach.behind + reach.ahead);
  }
  return std::max<std::int64_t>(1, std::min(most, kBlockElements / (keys * heads_per_kv)));
}

template <class F>
void for_each_block(const at::Tensor& q, const at::Tensor& k, const AttentionOptions& options, const F& visit) {
  const auto& offsets = *options.segment_offsets;
  const std::int64_t kv_heads = k.size(1), heads_per_kv = q.size(1) / kv_heads;
  const Reach reach = reach_of(options);
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t begin = offsets[s], n = offsets[s + 1] - begin;
    if (!takes_blocks(options, n)) continue;
    const std::int64_t rows = rows_of_block(reach, n, heads_per_kv);
    for (std::int64_t kv = 0; kv < kv_heads; ++kv)
      for (std::int64_t row = 0; row < n; row += rows) {
        const std::int64_t row_end = std::min(n, row + rows);
        visit(Block{kv, heads_per_kv, begin, begin + n, begin + row, begin + row_end, begin + reach.first_key(row),
                    begin + reach.end_key(row_end - 1, n)});
      }
  }
}

struct Probabilities {
  at::Tensor p;      // [heads_per_kv, rows, keys] fp32, before dropout
  at::Tensor slope;  // the cap's derivative, of p's shape; undefined without a cap
};

// The bias of a block's heads, rows and keys.
at::Tensor bias_of(const Block& block, const at::Tensor& table) {
  const std::int64_t middle = (table.size(1) - 1) / 2, lowest = middle + block.key_begin - (block.row_end - 1);
  return table.slice(0, block.kv_head * block.heads_per_kv, (block.kv_head + 1) * block.heads_per_kv)
      .slice(1, lowest, lowest + block.rows() - 1 + block.keys())
      .unfold(1, block.keys(), 1)
      .flip(1);
}

// queries [heads_per_kv * rows, D], keys [keys, D]
Probabilities probabilities(const at::Tensor& queries, const at::Tensor& keys, const Block& block,
                            const AttentionOptions& options) {
  at::Tensor scores = block.by_head(matrix_product(queries, keys.t()).mul_(options.scale)), slope;
  if (options.soft_cap > 0) {
    scores.div_(options.soft_cap).tanh_();
    slope = 1 - scores * scores;
    scores.mul_(options.soft_cap);
  }
  if (options.relative_bias.defined()) scores.add_(bias_of(block, options.relative_bias));
  const Reach reach = reach_of(options);
  const double hidden = -std::numeric_limits<double>::infinity();
  const std::int64_t diagonal = block.row_begin - block.key_begin;  // row r and key (r + diagonal) are one token
  const auto ones = [&] { return at::ones({block.rows(), block.keys()}, at::kBool); };
  if (diagonal + reach.ahead + 1 < block.keys()) scores.masked_fill_(ones().triu_(diagonal + reach.ahead + 1), hidden);
  if (block.row_end - 1 - reach.behind > block.key_begin)
    scores.masked_fill_(ones().tril_(diagonal - reach.behind - 1), hidden);
  return {at::softmax(scores, -1), slope};
}

at::Tensor dropout_mask(const Block& block, const DropoutSite& site) {
  const std::int64_t rows = block.rows(), keys = block.keys();
  at::Tensor mask = at::empty({block.heads_per_kv, rows, keys}, at::kFloat);
  auto* into = mask.mutable_data_ptr<float>();
  const std::int64_t first_head = block.kv_head * block.heads_per_kv;
  at::parallel_for(0, block.heads_per_kv * rows, 64, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t i = begin; i < end; ++i)
      fill_dropout_row(site, dropout_row_of(block.row_begin + i % rows, first_head + i / rows),
                       std::span<float>(into + i * keys, static_cast<std::size_t>(keys)),
                       static_cast<std::uint64_t>(block.key_begin - block.segment_begin));
  });
  return mask;
}

// Adds gradients of scores, [heads_per_kv, rows, keys], to the sums of their diagonals; rows in turn, a head a thread.
void add_diagonals(const Block& block, const at::Tensor& d_scores, at::Tensor& sums) {
  const std::int64_t rows = block.rows(), keys = block.keys();
  const auto* from = d_scores.const_data_ptr<float>();
  at::parallel_for(0, block.heads_per_kv, 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t head = first; head < last; ++head) {
      float* into = diagonals_of(sums, block.kv_head * block.heads_per_kv + head, block.segment_begin) +
                    (block.segment_end - block.segment_begin - 1);
      for (std::int64_t r = 0; r < rows; ++r) {
        const float* row = from + (head * rows + r) * keys;
        float* diagonal = into + (block.key_begin - block.row_begin - r);
        for (std::int64_t j = 0; j < keys; ++j) diagonal[j] += row[j];
      }
    }
  });
}

// Adds to wide_dk and wide_dv: a key belongs to several blocks of query rows.
void differentiate(const Block& block, const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k,
                   const at::Tensor& v, const AttentionOptions& options, const AttentionGradients& into) {
  const at::Tensor queries = block.all_rows_of(q), d_out = block.all_rows_of(grad);
  const at::Tensor keys = block.wide_keys_of(k), values = block.wide_keys_of(v);
  const auto [p, slope] = probabilities(queries, keys, block, options);
  at::Tensor ds = block.by_head(matrix_product(d_out, values.t())), kept = p;
  if (options.dropout.is_active()) {
    const at::Tensor mask = dropout_mask(block, options.dropout);
    ds.mul_(mask);
    kept = p * mask;
  }
  block.keys_of(into.v).add_(matrix_product(Block::flat(kept).t(), d_out));
  ds.sub_((ds * p).sum(-1, true)).mul_(p);
  if (into.diagonal_sums != nullptr) add_diagonals(block, ds, *into.diagonal_sums);
  if (slope.defined()) ds.mul_(slope);
  ds.mul_(options.scale);
  block.keys_of(into.k).add_(matrix_product(Block::flat(ds).t(), queries));
  block.rows_of(into.q).copy_(block.by_head(matrix_product(Block::flat(ds), keys)));
}

}  // namespace

bool takes_blocks(const AttentionOptions& options, std::int64_t length) {
  return length > kShortSegment && (options.dropout.is_active() || has_hooks(options, length));
}

void blocked_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                               const AttentionOptions& options, at::Tensor& out) {
  for_each_block(q, k, options, [&](const Block& block) {
    at::Tensor p = probabilities(block.all_rows_of(q), block.wide_keys_of(k), block, options).p;
    if (options.dropout.is_active()) p.mul_(dropout_mask(block, options.dropout));
    block.rows_of(out).copy_(block.by_head(matrix_product(Block::flat(p), block.wide_keys_of(v))));
  });
}

void blocked_attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                                const AttentionOptions& options, const AttentionGradients& into) {
  at::Tensor wide_dk = at::zeros(into.k.sizes(), at::kFloat), wide_dv = at::zeros(into.v.sizes(), at::kFloat);
  const AttentionGradients wide{into.q, wide_dk, wide_dv, into.diagonal_sums};
  for_each_block(q, k, options, [&](const Block& block) { differentiate(block, grad, q, k, v, options, wide); });
  into.k.copy_(wide_dk);
  into.v.copy_(wide_dv);
}

}  // namespace shardtune
