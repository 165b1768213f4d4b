// Attention over packed rows: values and gradients against fp64, isolation of segments, dropout, memory.
#include "kernels/attention.hpp"

#include <cmath>
#include <limits>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "kernels/instruction_set.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

constexpr std::int64_t kLongestShort = 256;  // longer segments take another path

bool has_bf16_products() { return instruction_set() >= InstructionSet::avx512_bf16; }

struct AttentionCase {
  std::vector<std::int64_t> offsets;
  std::int64_t heads, kv_heads, head_size;
  bool is_causal = false;
  double dropout = 0;
  at::ScalarType dtype = at::kFloat;

  std::int64_t tokens() const { return offsets.back(); }
  AttentionOptions options() const {
    return {.segment_offsets = std::make_shared<const std::vector<std::int64_t>>(offsets),
            .is_causal = is_causal,
            .scale = 1 / std::sqrt(static_cast<double>(head_size)),
            .dropout = {.probability = dropout, .key = 99}};
  }
  std::string text() const {
    return fmt::format("offsets {}, {} heads, {} key heads, size {}{}{}{}", fmt::join(offsets, " "), heads, kv_heads,
                       head_size, is_causal ? ", causal" : "", dropout > 0 ? ", dropout" : "",
                       fmt::format(", {}", at::toString(dtype)));
  }
};

struct AttentionInputs {
  at::Tensor q, k, v, seed;
  explicit AttentionInputs(const AttentionCase& c)
      : q(random_tensor(1, {c.tokens(), c.heads, c.head_size}, c.dtype)),
        k(random_tensor(2, {c.tokens(), c.kv_heads, c.head_size}, c.dtype)),
        v(random_tensor(3, {c.tokens(), c.kv_heads, c.head_size}, c.dtype)),
        seed(random_tensor(4, {c.tokens(), c.heads, c.head_size}, c.dtype)) {}
};

// Output and gradients, or how far they may be off.
struct AttentionRun {
  at::Tensor out, dq, dk, dv;
  std::vector<std::pair<const char*, at::Tensor>> named() const {
    return {{"out", out}, {"dq", dq}, {"dk", dk}, {"dv", dv}};
  }
};

AttentionRun run(const AttentionCase& c, const AttentionInputs& in, bool reference = false) {
  const auto make_leaf = reference ? double_leaf : leaf;
  const at::Tensor q = make_leaf(in.q), k = make_leaf(in.k), v = make_leaf(in.v);
  const at::Tensor out =
      reference ? varlen_attention_reference(q, k, v, c.options()) : varlen_attention(q, k, v, c.options());
  const auto grads = gradients(out, in.seed, {q, k, v});
  return {out, grads[0], grads[1], grads[2]};
}

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

// Rounding of one segment. Scores are sums of D products, so a probability is off by twice that relative to itself;
// every later sum adds one unit per term. Flash attention and the kernel for bf16 products store probabilities, the output that
// the backward pass starts from and the gradients of scores in the inputs' dtype and may sum the heads of a group in it: a unit
// each. bf16 products flush denormal numbers to zero.
AttentionRun segment_slack(const AttentionCase& c, const AttentionInputs& in, std::int64_t begin, std::int64_t end) {
  const std::int64_t n = end - begin, group = c.heads / c.kv_heads;
  const auto part = [&](const at::Tensor& x) { return exact(x.slice(0, begin, end)).transpose(0, 1); };
  const auto wide = [&](const at::Tensor& x) { return part(x).repeat_interleave(group, 0); };
  const at::Tensor q = part(in.q), k = wide(in.k), v = wide(in.v).abs(), g = part(in.seed).abs();
  const bool is_flash = c.dropout == 0 && n > kLongestShort, has_products = c.dtype == at::kBFloat16 && has_bf16_products();
  const double scale = c.options().scale,
               stored = (is_flash && c.dtype != at::kFloat) || has_products ? unit_of(c.dtype) : 0;
  const double tiny = has_products ? 0x1p-126 : stored > 0 ? half_denormal_step(c.dtype) : 0;
  at::Tensor scores = at::matmul(q, k.transpose(1, 2)) * scale;
  at::Tensor terms = at::matmul(q.abs(), k.abs().transpose(1, 2)) * scale;
  if (c.is_causal) {
    const at::Tensor future = at::ones({n, n}, at::kBool).triu(1);
    scores = scores.masked_fill(future, -std::numeric_limits<double>::infinity());
    terms = terms.masked_fill(future, 0.0);
  }
  const at::Tensor p = at::softmax(scores, -1);
  const at::Tensor m = c.dropout > 0 ? keep_mask(c, begin, n) : at::ones({1}, at::kDouble);
  const auto units = [](std::int64_t count) { return kUnit * static_cast<double>(count); };
  const at::Tensor p_error = 2 * units(c.head_size + 4) * terms.amax(-1, true) + units(n + 16);  // relative, per row
  const auto back = [](const at::Tensor& x) { return x.transpose(0, 1); };
  const auto sum_group = [&](const at::Tensor& x) { return back(x.view({c.kv_heads, group, n, -1}).sum(1)); };
  const at::Tensor pm = p * m, db = at::matmul(g, v.transpose(1, 2));
  const at::Tensor ds = p * (db * m + (pm * db).sum(-1, true));
  const at::Tensor ds_error = ds * (p_error + units(c.head_size + n + 16) + 4 * stored) + tiny;
  AttentionRun slack;
  slack.out = back(at::matmul(pm * (p_error + units(n) + stored) + tiny, v));
  slack.dq = back(scale * at::matmul(ds_error + units(n + 4) * ds, k.abs()));
  slack.dk = sum_group(scale * at::matmul((ds_error + (units(n + 4) + stored) * ds).transpose(1, 2), q.abs()));
  slack.dv = sum_group(at::matmul((pm * (p_error + units(n + 4) + 2 * stored) + tiny).transpose(1, 2), g));
  return slack;
}

void expect_near_fp64(const AttentionCase& c) {
  const AttentionInputs in(c);
  const AttentionRun own = run(c, in), wanted = run(c, in, true);
  std::vector<at::Tensor> slack[4];
  for (std::size_t s = 0; s + 1 < c.offsets.size(); ++s) {
    const auto parts = segment_slack(c, in, c.offsets[s], c.offsets[s + 1]).named();
    for (std::size_t i = 0; i < 4; ++i) slack[i].push_back(parts[i].second);
  }
  EXPECT_TRUE(own.out.is_contiguous());
  for (std::size_t i = 0; i < 4; ++i) {
    EXPECT_EQ(own.named()[i].second.scalar_type(), c.dtype);
    expect_within(own.named()[i].second, wanted.named()[i].second, at::cat(slack[i]),
                  c.text() + " " + own.named()[i].first);
  }
}

std::vector<AttentionCase> shapes() {
  return {{.offsets = {0, 1}, .heads = 1, .kv_heads = 1, .head_size = 1},
          {.offsets = {0, 1, 2, 3}, .heads = 2, .kv_heads = 1, .head_size = 8},
          {.offsets = {0, 7, 8, 25}, .heads = 4, .kv_heads = 2, .head_size = 5},
          {.offsets = {0, 33, 34, 98}, .heads = 3, .kv_heads = 3, .head_size = 24},
          {.offsets = {0, 17, 67}, .heads = 6, .kv_heads = 2, .head_size = 64},
          {.offsets = {0, 3, 303}, .heads = 2, .kv_heads = 1, .head_size = 33},
          {.offsets = {0, 65, 66, 130, 161}, .heads = 2, .kv_heads = 1, .head_size = 128},
          {.offsets = {0, 31, 95}, .heads = 1, .kv_heads = 1, .head_size = 80},
          {.offsets = {0, 40}, .heads = 1, .kv_heads = 1, .head_size = 256},
          {.offsets = {0, 256, 513}, .heads = 2, .kv_heads = 1, .head_size = 16},
          {.offsets = {0, 701}, .heads = 2, .kv_heads = 2, .head_size = 16}};
}

TEST(Attention, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (AttentionCase c : shapes())
    for (const bool is_causal : {false, true})
      for (const at::ScalarType dtype : kDtypes) {
        c.is_causal = is_causal;
        c.dtype = dtype;
        expect_near_fp64(c);
      }
}

TEST(Attention, WithDropoutTheSameAgainstTheMaskedReference) {
  for (AttentionCase c : shapes()) {
    if (c.tokens() > 350) continue;  // the reference draws its mask one element at a time
    for (const bool is_causal : {false, true})
      for (const at::ScalarType dtype : kDtypes) {
        c.is_causal = is_causal;
        c.dtype = dtype;
        c.dropout = 0.3;
        expect_near_fp64(c);
      }
  }
}

TEST(Attention, SegmentsAreIsolated) {
  for (const double dropout : {0.0, 0.2})
    for (const bool is_causal : {false, true})
      for (const at::ScalarType dtype : kDtypes) {
        const AttentionCase c{{0, 19, 20, 53}, 4, 2, 12, is_causal, dropout, dtype};
        AttentionInputs in(c);
        const AttentionRun before = run(c, in);
        for (const at::Tensor& t : {in.q, in.k, in.v, in.seed}) t.slice(0, 19, 20).fill_(1e4);
        const AttentionRun after = run(c, in);
        for (std::size_t i = 0; i < 4; ++i) {
          const at::Tensor a = before.named()[i].second, b = after.named()[i].second;
          const std::string what = c.text() + " " + before.named()[i].first;
          expect_same_bits(b.slice(0, 0, 19), a.slice(0, 0, 19), what + " before");
          expect_same_bits(b.slice(0, 20), a.slice(0, 20), what + " after");
          if (i == 0) {
            EXPECT_FALSE(at::equal(b.slice(0, 19, 20), a.slice(0, 19, 20))) << what;
          }
        }
      }
}

TEST(Attention, CausalTokensSeeNothingLater) {
  for (const double dropout : {0.0, 0.2}) {
    const AttentionCase c{
        .offsets = {0, 41}, .heads = 2, .kv_heads = 1, .head_size = 6, .is_causal = true, .dropout = dropout};
    AttentionInputs in(c);
    const at::Tensor before = run(c, in).out;
    for (const at::Tensor& t : {in.q, in.k, in.v}) t.slice(0, 30).fill_(7.0);
    const at::Tensor after = run(c, in).out;
    expect_same_bits(after.slice(0, 0, 30), before.slice(0, 0, 30), c.text());
    EXPECT_FALSE(at::equal(after.slice(0, 30), before.slice(0, 30)));
  }
}

TEST(Attention, ViewsIntoAFusedProjectionGiveTheSameBits) {
  for (const double dropout : {0.0, 0.2}) {
    const AttentionCase c{.offsets = {0, 11, 30}, .heads = 2, .kv_heads = 2, .head_size = 10, .dropout = dropout};
    const at::Tensor fused = random_tensor(1, {30, 3, 2, 10});
    AttentionInputs in(c);
    in.q = fused.select(1, 0).contiguous();
    in.k = fused.select(1, 1).contiguous();
    in.v = fused.select(1, 2).contiguous();
    const AttentionRun dense = run(c, in);
    const at::Tensor own = leaf(fused);
    const at::Tensor out = varlen_attention(own.select(1, 0), own.select(1, 1), own.select(1, 2), c.options());
    expect_same_bits(out, dense.out, c.text());
    expect_same_bits(gradients(out, in.seed, {own})[0], at::stack({dense.dq, dense.dk, dense.dv}, 1), c.text());
  }
}

TEST(Attention, DropoutIsTheSameWhenRecomputedAndKeepsTheMean) {
  // Equal scores and values of one: the output is the mean of the multipliers.
  AttentionCase c{.offsets = {0, 250, 500}, .heads = 4, .kv_heads = 4, .head_size = 2, .dropout = 0.25};
  AttentionInputs in(c);
  in.q.zero_();
  in.v.fill_(1.0);
  const AttentionRun first = run(c, in), second = run(c, in);
  for (std::size_t i = 0; i < 4; ++i)
    expect_same_bits(second.named()[i].second, first.named()[i].second, first.named()[i].first);
  const double count = 500.0 * 4 * 250, deviation = std::sqrt(0.25 / 0.75 / count);
  EXPECT_NEAR(first.out.mean().item<double>(), 1.0, 5 * deviation);
  // Rows of two tokens, heads or segments are no copies of each other.
  const at::Tensor out = first.out.select(2, 0);
  for (const auto& [a, b] :
       {std::pair{out.select(1, 0), out.select(1, 1)}, {out.slice(0, 0, 250), out.slice(0, 250)}}) {
    const double correlation = ((a - 1) * (b - 1)).mean().item<double>() / (deviation * deviation * 500 * 4);
    EXPECT_LT(std::abs(correlation), 5 / std::sqrt(500.0));
  }
  AttentionOptions other = c.options();
  other.dropout.key = 100;
  EXPECT_FALSE(at::equal(varlen_attention(in.q, in.k, in.v, other), first.out));
}

TEST(Attention, NoTensorOfTokensTimesTokensExists) {
  constexpr std::int64_t kTokens = 8192;
  for (const double dropout : {0.0, 0.1}) {
    const AttentionCase c{.offsets = {0, kTokens}, .heads = 1, .kv_heads = 1, .head_size = 8, .dropout = dropout};
    const AttentionInputs in(c);
    const std::int64_t peak = peak_bytes_of([&] { run(c, in); });
    // Not even one byte for every pair; one fp32 number would be four times this.
    EXPECT_LT(peak, kTokens * kTokens) << c.text();
  }
}

TEST(Attention, ThreadCountChangesNoBitOfShortSegmentsAndRepetitionNone) {
  for (const double dropout : {0.0, 0.1})
    for (const at::ScalarType dtype : kDtypes) {
      AttentionCase c{{0, 3, 150, 250}, 6, 2, 32, true, dropout, dtype};
      const auto compute = [&] {
        const AttentionRun r = run(c, AttentionInputs(c));
        return std::vector<at::Tensor>{r.out, r.dq, r.dk, r.dv};
      };
      expect_same_bits_for_any_thread_count(compute, c.text());
      c.offsets = {0, 3, 500};
      if (dtype == at::kBFloat16 && has_bf16_products())
        expect_same_bits_for_any_thread_count(compute, c.text());
      else
        expect_same_bits_when_repeated(compute, c.text());
    }
}

TEST(Attention, RecomputationTakesTheKeptResultAndHasTheSameGradients) {
  for (const double dropout : {0.0, 0.2})
    for (const std::vector<std::int64_t>& offsets : std::vector<std::vector<std::int64_t>>{{0, 9, 40}, {0, 9, 300}}) {
      const AttentionCase c{.offsets = offsets, .heads = 2, .kv_heads = 1, .head_size = 6, .dropout = dropout};
      const AttentionInputs in(c);
      const AttentionRun plain = run(c, in);
      AttentionOptions options = c.options();
      options.recompute = std::make_shared<RecomputeContext>();
      at::Tensor first;
      {
        at::NoGradGuard no_grad;
        first = varlen_attention(in.q, in.k, in.v, options);
      }
      EXPECT_GT(options.recompute->num_bytes(), 0);
      const at::Tensor q = leaf(in.q), k = leaf(in.k), v = leaf(in.v);
      const at::Tensor again = varlen_attention(q, k, v, options);
      EXPECT_EQ(options.recompute->num_bytes(), 0);
      EXPECT_EQ(again.const_data_ptr(), first.const_data_ptr()) << "computed again";
      expect_same_bits(again, plain.out, c.text());
      expect_same_bits(gradients(again, in.seed, {q, k, v}), {plain.dq, plain.dk, plain.dv}, c.text());
    }
}

TEST(Attention, MisfitsAreRefused) {
  const AttentionCase good{.offsets = {0, 2, 4}, .heads = 4, .kv_heads = 2, .head_size = 4};
  const AttentionInputs in(good);
  EXPECT_NO_THROW(varlen_attention(in.q, in.k, in.v, good.options()));
  for (const std::vector<std::int64_t>& offsets :
       std::vector<std::vector<std::int64_t>>{{}, {0}, {0, 2}, {1, 4}, {0, 2, 2, 4}, {0, 3, 2, 4}}) {
    AttentionOptions options = good.options();
    options.segment_offsets = std::make_shared<const std::vector<std::int64_t>>(offsets);
    EXPECT_THROW(varlen_attention(in.q, in.k, in.v, options), Error) << offsets.size();
  }
  EXPECT_THROW(varlen_attention(in.q.slice(1, 0, 3), in.k, in.v, good.options()), Error);
  EXPECT_THROW(varlen_attention(in.q, in.k.slice(2, 0, 3), in.v.slice(2, 0, 3), good.options()), Error);
}

}  // namespace
}  // namespace shardtune::testing
