// Attention over packed rows: values and gradients against fp64, isolation of segments, dropout, memory.
#include "kernels/attention.hpp"

#include <cmath>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "kernels/instruction_set.hpp"
#include "tests/kernels/attention_support.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

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
          {.offsets = {0, 290}, .heads = 2, .kv_heads = 1, .head_size = 256},
          {.offsets = {0, 300}, .heads = 3, .kv_heads = 3, .head_size = 96},
          {.offsets = {0, 701}, .heads = 2, .kv_heads = 2, .head_size = 16}};
}

TEST(Attention, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (const AttentionCase& c : shapes()) expect_near_fp64_in_every_mode(c);
}

TEST(Attention, WithDropoutTheSameAgainstTheMaskedReference) {
  for (AttentionCase c : shapes()) {
    if (c.tokens() > 350) continue;  // the reference draws its mask one element at a time
    c.dropout = 0.3;
    expect_near_fp64_in_every_mode(c);
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

TEST(Attention, TheNumberOfThreadsDoesNotChangeABit) {
  for (const std::vector<std::int64_t>& offsets :
       std::vector<std::vector<std::int64_t>>{{0, 3, 150, 250}, {0, 3, 500}, {0, 1100}})
    for (const double dropout : {0.0, 0.1})
      for (const at::ScalarType dtype : kDtypes) {
        const AttentionCase c{offsets, 6, 2, 32, true, dropout, dtype};
        const auto compute = [&] {
          const AttentionRun r = run(c, AttentionInputs(c));
          return std::vector<at::Tensor>{r.out, r.dq, r.dk, r.dv};
        };
        // MKL's order of sums within flash attention is ATen's affair.
        const bool is_flash = dropout == 0 && c.longest() > 256 && !(dtype == at::kBFloat16 && has_bf16_products());
        if (is_flash && is_intel_processor()) {
          expect_same_bits_when_repeated(compute, c.text());
        } else {
          expect_same_bits_for_any_thread_count(compute, c.text());
        }
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
