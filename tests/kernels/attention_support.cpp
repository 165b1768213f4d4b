#include "tests/kernels/attention_support.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <gtest/gtest.h>

#include "kernels/instruction_set.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

constexpr std::int64_t kLongestShort = 256;  // longer segments take another path

at::Tensor keep_mask(const AttentionCase& c, std::int64_t begin, std::int64_t length) {
  at::Tensor mask = at::empty({c.heads, length, length}, at::kFloat);
  const DropoutSite site = c.options().dropout;
  auto* data = mask.mutable_data_ptr<float>();
  for (std::int64_t h = 0; h < c.heads; ++h)
    for (std::int64_t i = 0; i < length; ++i, data += length)
      fill_dropout_row(site, (static_cast<std::uint64_t>(begin + i) << 16) | static_cast<std::uint64_t>(h),
                       std::span<float>(data, static_cast<std::size_t>(length)));
  return mask.to(at::kDouble);
}

at::Tensor distances(std::int64_t n) { return at::arange(n) - at::arange(n).unsqueeze(1); }  // key minus query

at::Tensor hidden_pairs(const AttentionCase& c, std::int64_t n) {
  const at::Tensor distance = distances(n);
  at::Tensor hidden = at::zeros({n, n}, at::kBool);
  if (c.is_causal) hidden = hidden | (distance > 0);
  if (c.window > 0) hidden = hidden | (c.is_causal ? distance <= -c.window : distance.abs() > c.window);
  return hidden;
}

// What one segment's scores may be: fp64, with the error of fp32 ones in absolute terms.
struct Scores {
  at::Tensor value, error, slope;  // [H, n, n]; error is 0 where hidden
};
Scores segment_scores(const AttentionCase& c, const AttentionInputs& in, const at::Tensor& q, const at::Tensor& k) {
  const std::int64_t n = q.size(1);
  const double scale = c.options().scale;
  at::Tensor value = at::matmul(q, k.transpose(1, 2)) * scale, slope = at::ones({1}, at::kDouble);
  at::Tensor error =
      kUnit * static_cast<double>(c.head_size + 4) * at::matmul(q.abs(), k.abs().transpose(1, 2)) * scale;
  if (c.soft_cap > 0) {
    const at::Tensor t = at::tanh(value / c.soft_cap);
    value = t * c.soft_cap;
    slope = 1 - t * t;
    error = error + 8 * kUnit * value.abs();  // the tanh, a quotient, a product
  }
  if (c.has_bias) {
    const at::Tensor entry = distances(n) + (in.bias.size(1) - 1) / 2;
    value = value + exact(in.bias).index_select(1, entry.flatten()).view_as(value);
  }
  // Scale, sum and change of base are rounded one by one there.
  if (c.has_bias || c.soft_cap > 0)
    error = error + 4 * kUnit * (value.abs() + exact(in.bias.defined() ? in.bias : at::zeros({1})).abs().max());
  const at::Tensor hidden = hidden_pairs(c, n);
  return {value.masked_fill(hidden, -std::numeric_limits<double>::infinity()), error.masked_fill(hidden, 0.0), slope};
}

at::Tensor sum_of_diagonals(const AttentionInputs& in, const at::Tensor& pairs) {
  const at::Tensor entry = distances(pairs.size(1)) + (in.bias.size(1) - 1) / 2;
  return at::zeros(in.bias.sizes(), at::kDouble).index_add(1, entry.flatten(), pairs.flatten(1));
}

// Rounding of one segment. Scores are sums of D products, so a probability is off by twice that relative to itself;
// every later sum adds one unit per term. Flash attention and the kernel for bf16 products store probabilities, the
// output that the backward pass starts from and the gradients of scores in the inputs' dtype and may sum the heads of a
// group in it: a unit each. bf16 products flush denormal numbers to zero.
AttentionRun segment_slack(const AttentionCase& c, const AttentionInputs& in, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = end - begin, group = c.heads / c.kv_heads;
  const auto part = [&](const at::Tensor& x) { return exact(x.slice(0, begin, end)).transpose(0, 1); };
  const auto wide = [&](const at::Tensor& x) { return part(x).repeat_interleave(group, 0); };
  const at::Tensor q = part(in.q), k = wide(in.k), v = wide(in.v).abs(), g = part(in.seed).abs();
  const bool has_products = c.dtype == at::kBFloat16 && has_bf16_products(),
             is_flash = c.dropout == 0 && n > kLongestShort;
  const double scale = c.options().scale,
               stored = (is_flash && c.dtype != at::kFloat) || has_products ? unit_of(c.dtype) : 0;
  const double tiny = has_products ? 0x1p-126 : stored > 0 ? half_denormal_step(c.dtype) : 0;
  const Scores scores = segment_scores(c, in, q, k);
  const at::Tensor p = at::softmax(scores.value, -1);
  const at::Tensor m = c.dropout > 0 ? keep_mask(c, begin, n) : at::ones({1}, at::kDouble);
  const auto units = [](std::int64_t count) { return kUnit * static_cast<double>(count); };
  const at::Tensor p_error = 2 * scores.error.amax(-1, true) + units(n + 16);  // relative, per row
  const auto back = [](const at::Tensor& x) { return x.transpose(0, 1); };
  const auto sum_group = [&](const at::Tensor& x) { return back(x.view({c.kv_heads, group, n, -1}).sum(1)); };
  const at::Tensor pm = p * m, db = at::matmul(g, v.transpose(1, 2));
  const at::Tensor ds = p * (db * m + (pm * db).sum(-1, true));
  const at::Tensor ds_error = ds * (p_error + units(c.head_size + n + 16) + 4 * stored) + tiny;
  // Before the cap; the slope is off by some units of 1.
  const at::Tensor dx = ds * scores.slope, dx_error = ds_error * scores.slope + (c.soft_cap > 0 ? units(16) : 0.0) * ds;
  AttentionRun slack;
  slack.out = back(at::matmul(pm * (p_error + units(n) + stored) + tiny, v));
  slack.dq = back(scale * at::matmul(dx_error + units(n + 4) * dx, k.abs()));
  slack.dk = sum_group(scale * at::matmul((dx_error + (units(n + 4) + stored) * dx).transpose(1, 2), q.abs()));
  slack.dv = sum_group(at::matmul((pm * (p_error + units(n + 4) + 2 * stored) + tiny).transpose(1, 2), g));
  const auto num_segments = static_cast<std::int64_t>(c.offsets.size()) - 1;
  if (c.has_bias) slack.d_bias = sum_of_diagonals(in, ds_error + units(n + num_segments) * ds);
  return slack;
}

}  // namespace

bool has_bf16_products() { return instruction_set() >= InstructionSet::avx512_bf16; }

std::int64_t AttentionCase::longest() const {
  std::int64_t longest = 0;
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) longest = std::max(longest, offsets[s + 1] - offsets[s]);
  return longest;
}

AttentionOptions AttentionCase::options() const {
  return {.segment_offsets = std::make_shared<const std::vector<std::int64_t>>(offsets),
          .is_causal = is_causal,
          .scale = 1 / std::sqrt(static_cast<double>(head_size)),
          .window = window,
          .soft_cap = soft_cap,
          .dropout = {.probability = dropout, .key = 99}};
}

std::string AttentionCase::text() const {
  return fmt::format("offsets {}, {} heads, {} key heads, size {}{}{}{}{}{}, {}", fmt::join(offsets, " "), heads,
                     kv_heads, head_size, is_causal ? ", causal" : "", dropout > 0 ? ", dropout" : "",
                     window > 0 ? fmt::format(", window {}", window) : "", soft_cap > 0 ? ", cap" : "",
                     has_bias ? ", bias" : "", at::toString(dtype));
}

AttentionInputs::AttentionInputs(const AttentionCase& c)
    : q(random_tensor(1, {c.tokens(), c.heads, c.head_size}, c.dtype)),
      k(random_tensor(2, {c.tokens(), c.kv_heads, c.head_size}, c.dtype)),
      v(random_tensor(3, {c.tokens(), c.kv_heads, c.head_size}, c.dtype)),
      seed(random_tensor(4, {c.tokens(), c.heads, c.head_size}, c.dtype)) {
  if (c.has_bias) bias = random_tensor(5, {c.heads, 2 * (c.longest() + 3) - 1});
}

std::vector<std::pair<const char*, at::Tensor>> AttentionRun::named() const {
  std::vector<std::pair<const char*, at::Tensor>> list{{"out", out}, {"dq", dq}, {"dk", dk}, {"dv", dv}};
  if (d_bias.defined()) list.emplace_back("d_bias", d_bias);
  return list;
}
std::vector<at::Tensor> AttentionRun::all() const {
  std::vector<at::Tensor> list;
  for (const auto& [name, tensor] : named()) list.push_back(tensor);
  return list;
}

AttentionRun run(const AttentionCase& c, const AttentionInputs& in, bool reference) {
  const auto make_leaf = reference ? double_leaf : leaf;
  const at::Tensor q = make_leaf(in.q), k = make_leaf(in.k), v = make_leaf(in.v);
  AttentionOptions options = c.options();
  std::vector<at::Tensor> inputs{q, k, v};
  if (c.has_bias) inputs.push_back(options.relative_bias = make_leaf(in.bias));
  const at::Tensor out = reference ? varlen_attention_reference(q, k, v, options) : varlen_attention(q, k, v, options);
  const auto grads = gradients(out, in.seed, inputs);
  return {out, grads[0], grads[1], grads[2], c.has_bias ? grads[3] : at::Tensor()};
}

void expect_near_fp64(const AttentionCase& c) {
  const AttentionInputs in(c);
  const AttentionRun own = run(c, in), wanted = run(c, in, true);
  std::vector<at::Tensor> slack[4];
  at::Tensor bias_slack = at::zeros({1}, at::kDouble);
  for (std::size_t s = 0; s + 1 < c.offsets.size(); ++s) {
    const AttentionRun parts = segment_slack(c, in, c.offsets[s], c.offsets[s + 1]);
    for (std::size_t i = 0; i < 4; ++i) slack[i].push_back(parts.named()[i].second);
    if (c.has_bias) bias_slack = bias_slack + parts.d_bias;
  }
  EXPECT_TRUE(own.out.is_contiguous());
  const auto named = own.named();
  for (std::size_t i = 0; i < named.size(); ++i) {
    const auto& [name, tensor] = named[i];
    EXPECT_EQ(tensor.scalar_type(), i < 4 ? c.dtype : at::kFloat);
    expect_within(tensor, wanted.named()[i].second, i < 4 ? at::cat(slack[i]) : bias_slack, c.text() + " " + name);
  }
}

void expect_near_fp64_in_every_mode(AttentionCase c) {
  for (const bool is_causal : {false, true})
    for (const at::ScalarType dtype : kDtypes) {
      c.is_causal = is_causal;
      c.dtype = dtype;
      expect_near_fp64(c);
    }
}

}  // namespace shardtune::testing
