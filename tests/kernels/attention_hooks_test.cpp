// Sliding window, soft cap and bias by distance of attention: values and gradients against fp64, reach, determinism.
#include <cmath>
#include <limits>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "kernels/attention.hpp"
#include "tests/kernels/attention_support.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

// Windows within, at and beyond the blocks of 4, 32 and 64 query rows and the segments; a cap that bends the scores.
std::vector<AttentionCase> with_hooks(const AttentionCase& shape, const std::vector<std::int64_t>& windows) {
  std::vector<AttentionCase> cases;
  for (const std::int64_t window : windows) {
    cases.push_back(shape);
    cases.back().window = window;
    cases.push_back(cases.back());
    cases.back().soft_cap = 1.5;
    cases.back().has_bias = true;
  }
  cases.push_back(shape);
  cases.back().soft_cap = 0.8;
  cases.push_back(shape);
  cases.back().has_bias = true;
  return cases;
}

std::vector<AttentionCase> short_shapes() {
  return {{.offsets = {0, 1}, .heads = 1, .kv_heads = 1, .head_size = 1},
          {.offsets = {0, 7, 8, 25}, .heads = 4, .kv_heads = 2, .head_size = 5},
          {.offsets = {0, 33, 34, 98}, .heads = 3, .kv_heads = 3, .head_size = 32},
          {.offsets = {0, 17, 84}, .heads = 6, .kv_heads = 2, .head_size = 64},
          {.offsets = {0, 65, 66, 131}, .heads = 2, .kv_heads = 1, .head_size = 128},
          {.offsets = {0, 40}, .heads = 1, .kv_heads = 1, .head_size = 256}};
}

TEST(AttentionHooks, ValuesAndGradientsOfShortSegmentsLieWithinTheRoundingOfFp64) {
  for (const AttentionCase& shape : short_shapes())
    for (const AttentionCase& c : with_hooks(shape, {1, 5, 32, 65, 1000})) expect_near_fp64_in_every_mode(c);
}

TEST(AttentionHooks, ValuesAndGradientsOfLongSegmentsLieWithinTheRoundingOfFp64) {
  for (const AttentionCase& shape :
       std::vector<AttentionCase>{{.offsets = {0, 3, 303}, .heads = 4, .kv_heads = 2, .head_size = 32},
                                  {.offsets = {0, 256, 513, 530}, .heads = 2, .kv_heads = 1, .head_size = 16}})
    for (const AttentionCase& c : with_hooks(shape, {1, 47, 256})) expect_near_fp64_in_every_mode(c);
}

TEST(AttentionHooks, WithDropoutTheSameAgainstTheMaskedReference) {
  for (const AttentionCase& shape :
       std::vector<AttentionCase>{{.offsets = {0, 7, 8, 140}, .heads = 2, .kv_heads = 1, .head_size = 20},
                                  {.offsets = {0, 290}, .heads = 1, .kv_heads = 1, .head_size = 12}})
    for (AttentionCase c : with_hooks(shape, {21})) {
      c.dropout = 0.3;
      expect_near_fp64_in_every_mode(c);
    }
}

// What a query at 200 sees: its last keys, itself among them, or as many on either side.
TEST(AttentionHooks, TheBoundsOfTheWindowAreThoseOfTransformers) {
  for (const std::int64_t tokens : {210, 700})
    for (const at::ScalarType dtype : kDtypes)
      for (const bool is_causal : {false, true}) {
        AttentionCase c{.offsets = {0, tokens}, .heads = 1, .kv_heads = 1, .head_size = 8, .is_causal = is_causal};
        c.dtype = dtype;
        c.window = 9;
        AttentionInputs in(c);
        in.q.zero_();  // equal probabilities
        in.v.zero_();
        in.v.slice(0, 195, 196).fill_(1.0);
        const at::Tensor seen = run(c, in).out.select(2, 0).select(1, 0).ne(0);
        const std::int64_t first = is_causal ? 195 : 195 - 9, end = is_causal ? 195 + 9 : 195 + 9 + 1;
        EXPECT_EQ(seen.nonzero().flatten().equal(at::arange(first, end)), true) << c.text() << "\n"
                                                                                << seen.nonzero().flatten();
      }
}

// A product of 0 and NaN would be NaN: what lies far outside is not multiplied at all.
TEST(AttentionHooks, KeysFarOutsideOfTheWindowAreNotTouched) {
  for (const std::int64_t tokens : {250, 900})
    for (const at::ScalarType dtype : kDtypes)
      for (const bool is_causal : {false, true})
        for (const double dropout : {0.0, 0.2}) {
          AttentionCase c{{0, tokens}, 2, 1, 16, is_causal, dropout, dtype};
          c.window = 10;
          c.soft_cap = 2;
          AttentionInputs in(c);
          const at::Tensor before = run(c, in).out;
          in.k.slice(0, 0, 20).fill_(std::numeric_limits<double>::quiet_NaN());
          in.v.slice(0, 0, 20).fill_(std::numeric_limits<double>::quiet_NaN());
          const AttentionRun after = run(c, in);
          expect_same_bits(after.out.slice(0, 180), before.slice(0, 180), c.text());
          EXPECT_FALSE(after.dq.slice(0, 180).isnan().any().item<bool>()) << c.text();
          EXPECT_TRUE(after.out.slice(0, 0, 30).isnan().all().item<bool>()) << c.text();
        }
}

TEST(AttentionHooks, AWindowThatHidesNothingChangesNoBit) {
  for (const std::vector<std::int64_t>& offsets :
       std::vector<std::vector<std::int64_t>>{{0, 30, 31, 171}, {0, 12, 300, 310}})
    for (const at::ScalarType dtype : kDtypes)
      for (const bool is_causal : {false, true}) {
        AttentionCase c{offsets, 4, 2, 12, is_causal, 0, dtype};
        const AttentionInputs in(c);
        const AttentionRun plain = run(c, in);
        c.window = is_causal ? c.longest() : c.longest() - 1;
        expect_same_bits(run(c, in).all(), plain.all(), c.text());
        --c.window;
        EXPECT_FALSE(at::equal(run(c, in).out, plain.out)) << c.text();
      }
}

TEST(AttentionHooks, TheNumberOfThreadsDoesNotChangeABit) {
  for (const std::vector<std::int64_t>& offsets : std::vector<std::vector<std::int64_t>>{{0, 3, 150, 250}, {0, 3, 500}})
    for (const double dropout : {0.0, 0.1})
      for (const at::ScalarType dtype : kDtypes) {
        AttentionCase c{offsets, 6, 2, 32, true, dropout, dtype};
        c.window = 60;
        c.soft_cap = 3;
        c.has_bias = true;
        expect_same_bits_for_any_thread_count([&] { return run(c, AttentionInputs(c)).all(); }, c.text());
      }
}

TEST(AttentionHooks, RecomputationTakesTheKeptResultAndHasTheSameGradients) {
  for (const double dropout : {0.0, 0.2})
    for (const at::ScalarType dtype : kDtypes)
      for (const std::vector<std::int64_t>& offsets : std::vector<std::vector<std::int64_t>>{{0, 9, 40}, {0, 9, 300}}) {
        AttentionCase c{offsets, 2, 1, 6, true, dropout, dtype};
        c.window = 7;
        c.soft_cap = 1.5;
        c.has_bias = true;
        const AttentionInputs in(c);
        const AttentionRun plain = run(c, in);
        AttentionOptions options = c.options();
        options.recompute = std::make_shared<RecomputeContext>();
        const at::Tensor bias = options.relative_bias = leaf(in.bias);
        at::Tensor first;
        {
          at::NoGradGuard no_grad;
          first = varlen_attention(in.q, in.k, in.v, options);
        }
        const at::Tensor q = leaf(in.q), k = leaf(in.k), v = leaf(in.v);
        const at::Tensor again = varlen_attention(q, k, v, options);
        EXPECT_EQ(again.const_data_ptr(), first.const_data_ptr()) << "computed again";
        const std::vector<at::Tensor> expected = plain.all();
        expect_same_bits(again, expected[0], c.text());
        expect_same_bits(gradients(again, in.seed, {q, k, v, bias}), {expected.begin() + 1, expected.end()}, c.text());
      }
}

TEST(AttentionHooks, NoTensorOfTokensTimesTokensExists) {
  constexpr std::int64_t kTokens = 8192;
  for (const std::int64_t window : {0, 300}) {
    AttentionCase c{.offsets = {0, kTokens}, .heads = 1, .kv_heads = 1, .head_size = 8, .is_causal = true};
    c.window = window;
    c.has_bias = true;
    const AttentionInputs in(c);
    EXPECT_LT(peak_bytes_of([&] { run(c, in); }), kTokens * kTokens) << c.text();
  }
}

TEST(AttentionHooks, MisfitsAreRefused) {
  const AttentionCase c{.offsets = {0, 2, 7}, .heads = 4, .kv_heads = 2, .head_size = 4};
  const AttentionInputs in(c);
  const auto attempt = [&](const auto& change) {
    AttentionOptions options = c.options();
    change(options);
    varlen_attention(in.q, in.k, in.v, options);
  };
  const auto bias = [](std::vector<std::int64_t> sizes, at::ScalarType dtype = at::kFloat) {
    return [=](AttentionOptions& options) { options.relative_bias = at::zeros(sizes, dtype); };
  };
  EXPECT_NO_THROW(attempt(bias({4, 9})));
  EXPECT_NO_THROW(attempt(bias({4, 21})));
  EXPECT_THROW(attempt(bias({4, 7})), Error);
  EXPECT_THROW(attempt(bias({4, 10})), Error);
  EXPECT_THROW(attempt(bias({2, 9})), Error);
  EXPECT_THROW(attempt(bias({9})), Error);
  EXPECT_THROW(attempt(bias({4, 9}, at::kBFloat16)), Error);
  EXPECT_THROW(attempt([](AttentionOptions& options) { options.window = -1; }), Error);
  EXPECT_THROW(attempt([](AttentionOptions& options) { options.soft_cap = -1; }), Error);
  EXPECT_THROW(attempt([](AttentionOptions& options) { options.soft_cap = NAN; }), Error);
}

}  // namespace
}  // namespace shardtune::testing
