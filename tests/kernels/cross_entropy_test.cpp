// Cross-entropy and the fused language-model head, with and without label smoothing: loss and gradients against fp64,
// ignored labels, chunks, memory.
#include "kernels/cross_entropy.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "core/rng.hpp"
#include "kernels/instruction_set.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

// Every fourth label or so is ignored.
at::Tensor random_labels(std::uint64_t key, std::int64_t count, std::int64_t classes) {
  PhiloxStream random(key);
  at::Tensor labels = at::empty({count}, at::kLong);
  for (std::int64_t i = 0; i < count; ++i)
    labels.mutable_data_ptr<std::int64_t>()[i] =
        random.next_below(4) == 0 ? kIgnoredLabel
                                  : static_cast<std::int64_t>(random.next_below(static_cast<std::uint64_t>(classes)));
  return labels;
}

struct HeadCase {
  std::int64_t tokens, width, vocabulary, chunk;
  at::ScalarType dtype;
  double scale;
  double smoothing = 0.0;
  HeadOptions options() const { return {.loss_scale = scale, .label_smoothing = smoothing, .chunk_rows = chunk}; }
};

std::string to_text(const HeadCase& c) {
  return fmt::format("[{}, {}] x {} in chunks of {}, {}, smoothing {}", c.tokens, c.width, c.vocabulary, c.chunk,
                     at::toString(c.dtype), c.smoothing);
}

struct HeadInputs {
  at::Tensor hidden, weight, labels;
  explicit HeadInputs(const HeadCase& c)
      : hidden(random_tensor(1, {c.tokens, c.width}, c.dtype)),
        weight(random_tensor(2, {c.vocabulary, c.width}, c.dtype)),
        labels(random_labels(3, c.tokens, c.vocabulary)) {}
};

struct HeadRun {
  at::Tensor loss, d_hidden, d_weight;
};

HeadRun run(const HeadCase& c, const HeadInputs& in) {
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
  const at::Tensor loss = linear_cross_entropy_sum(hidden, weight, in.labels, c.options());
  const auto grads = gradients(loss, at::ones({}), {hidden, weight});
  return {loss, grads[0], grads[1]};
}

// What the definition gives in fp64, and how far rounding may move it.
struct HeadExpectation {
  HeadRun exact_run, slack;
  HeadExpectation(const HeadCase& c, const HeadInputs& in) {
    const at::Tensor rows = at::nonzero(in.labels != kIgnoredLabel).squeeze(1);
    const at::Tensor labels = in.labels.index_select(0, rows);
    const at::Tensor hidden = exact(in.hidden).index_select(0, rows), weight = exact(in.weight);
    const at::Tensor logits = rounded_logits(c, in.hidden.index_select(0, rows), in.weight);
    const at::Tensor log_p = at::log_softmax(logits, 1), p = log_p.exp();
    const double share = c.smoothing / static_cast<double>(c.vocabulary);
    const at::Tensor target = (1 - c.smoothing) * at::zeros_like(p).scatter_(1, labels.unsqueeze(1), 1.0) + share;
    const at::Tensor d_logits = c.scale * (p - target);
    exact_run.loss = -c.scale * (log_p * target).sum();
    const auto spread = [&](const at::Tensor& d) {
      return at::zeros({c.tokens, c.width}, at::kDouble).index_copy_(0, rows, d);
    };
    exact_run.d_hidden = spread(at::mm(d_logits, weight));
    exact_run.d_weight = at::mm(d_logits.t(), hidden);

    // An fp32 logit is a sum of D products; in bf16 it is the very number that the kernel sees. e^x is off by four
    // units of its value, and by as many units as its argument is large.
    const at::Tensor terms = at::mm(hidden.abs(), weight.abs().t()).amax(1, true);
    const at::Tensor row = (c.dtype == at::kFloat ? static_cast<double>(c.width + 4) * kUnit : 0.0) * terms +
                           4 * kUnit * (2 + logits.abs().amax(1, true));
    // Smoothed, each lane adds up to 64 distances from the largest logit in fp32 before it goes on in double; the share
    // of a class and what is left after its subtraction are rounded, and so are scale and label's term.
    const at::Tensor distances = (logits - logits.amax(1, true)).abs().mean(1);
    slack.loss = c.scale * (2 * row.sum() + c.smoothing * 65 * kUnit * distances.sum());
    const at::Tensor ad = d_logits.abs(), rounding = unit_of(c.dtype) * ad + half_denormal_step(c.dtype);
    const at::Tensor smoothed = c.smoothing > 0 ? 2 * kUnit * (ad + c.scale * share) : at::zeros_like(ad);
    const at::Tensor d_slack = c.scale * p * (2 * row + 8 * kUnit) + smoothed + rounding;
    const double weight_sum = static_cast<double>(c.tokens + 4) * kUnit;
    slack.d_hidden = spread(at::mm(d_slack, weight.abs()) +
                            static_cast<double>(c.vocabulary + 4) * kUnit * at::mm(ad, weight.abs()));
    // Without bf16 products every chunk's product is stored in the dtype before it is added in fp32.
    const bool is_exact = c.dtype == at::kFloat || (c.dtype == at::kBFloat16 && instruction_set() >= InstructionSet::avx512_bf16);
    const double chunk_rounding = is_exact ? 0 : unit_of(c.dtype);
    slack.d_weight = at::mm(d_slack.t(), hidden.abs()) + (weight_sum + chunk_rounding) * at::mm(ad.t(), hidden.abs());
  }

  static at::Tensor rounded_logits(const HeadCase& c, const at::Tensor& hidden, const at::Tensor& weight) {
    if (c.dtype == at::kFloat) return at::mm(exact(hidden), exact(weight).t());
    std::vector<at::Tensor> parts{at::zeros({0, c.vocabulary}, at::kDouble)};
    const std::int64_t chunk = c.chunk > 0 ? c.chunk : 1024;
    for (std::int64_t at = 0; at < hidden.size(0); at += chunk)
      parts.push_back(exact(at::mm(hidden.slice(0, at, std::min(hidden.size(0), at + chunk)), weight.t())));
    return at::cat(parts);
  }
};

TEST(LinearCrossEntropy, LossAndGradientsLieWithinTheRoundingOfFp64) {
  for (const at::ScalarType dtype : kDtypes)
    for (const HeadCase& c :
         {HeadCase{1, 8, 5, 0, dtype, 1.0}, HeadCase{7, 5, 33, 0, dtype, 0.37}, HeadCase{40, 16, 257, 1, dtype, 1.0},
          HeadCase{40, 16, 257, 3, dtype, 1.0}, HeadCase{130, 24, 1003, 16, dtype, 1.0 / 97},
          HeadCase{130, 24, 1003, 0, dtype, 1.0}, HeadCase{20, 3, 16, 15, dtype, 2.0}, HeadCase{0, 4, 9, 0, dtype, 1.0},
          HeadCase{1, 8, 5, 0, dtype, 1.0, 0.1}, HeadCase{7, 5, 33, 0, dtype, 0.37, 0.3},
          HeadCase{40, 16, 257, 1, dtype, 1.0, 0.1}, HeadCase{40, 16, 257, 3, dtype, 1.0, 0.9},
          HeadCase{130, 24, 1003, 16, dtype, 1.0 / 97, 0.1}, HeadCase{20, 3, 16, 15, dtype, 2.0, 0.01},
          HeadCase{33, 24, 5009, 0, dtype, 1.0, 0.2}, HeadCase{0, 4, 9, 0, dtype, 1.0, 0.1}}) {
      const HeadInputs in(c);
      const HeadRun own = run(c, in);
      const HeadExpectation expected(c, in);
      EXPECT_EQ(own.loss.scalar_type(), at::kFloat);
      expect_within(own.loss, expected.exact_run.loss, expected.slack.loss, to_text(c) + " loss");
      expect_within(own.d_hidden, expected.exact_run.d_hidden, expected.slack.d_hidden, to_text(c) + " d hidden");
      expect_within(own.d_weight, expected.exact_run.d_weight, expected.slack.d_weight, to_text(c) + " d weight");
      at::NoGradGuard no_grad;
      expect_same_bits(linear_cross_entropy_sum(in.hidden, in.weight, in.labels, c.options()), own.loss,
                       to_text(c) + " loss without gradients");
    }
}

TEST(LinearCrossEntropy, ReferenceIsTheDefinition) {
  for (const double smoothing : {0.0, 0.1, 0.75}) {
    const HeadCase c{30, 7, 19, 0, at::kFloat, 0.5, smoothing};
    const HeadInputs in(c);
    const HeadExpectation expected(c, in);
    const at::Tensor hidden = double_leaf(in.hidden), weight = double_leaf(in.weight);
    const at::Tensor loss = linear_cross_entropy_sum_reference(hidden, weight, in.labels, c.scale, smoothing);
    EXPECT_NEAR(loss.item<double>(), expected.exact_run.loss.item<double>(), 1e-12);
    const auto grads = gradients(loss, at::ones({}), {hidden, weight});
    EXPECT_TRUE(at::allclose(grads[0], expected.exact_run.d_hidden, 1e-10, 1e-12));
    EXPECT_TRUE(at::allclose(grads[1], expected.exact_run.d_weight, 1e-10, 1e-12));
  }
}

void expect_ignored_rows_count_for_nothing(const HeadCase& c) {
  HeadInputs in(c);
  const HeadRun before = run(c, in);
  const at::Tensor ignored = in.labels == kIgnoredLabel;
  ASSERT_GT(ignored.sum().item<std::int64_t>(), 0);
  in.hidden.masked_fill_(ignored.unsqueeze(1), std::numeric_limits<float>::quiet_NaN());
  const HeadRun after = run(c, in);
  expect_same_bits(after.loss, before.loss, "loss");
  expect_same_bits(after.d_weight, before.d_weight, "d weight");
  expect_same_bits(after.d_hidden, before.d_hidden, "d hidden");
  EXPECT_EQ(after.d_hidden.masked_select(ignored.unsqueeze(1)).abs().sum().item<float>(), 0);
  in.labels.fill_(kIgnoredLabel);
  const HeadRun none = run(c, in);
  EXPECT_EQ(none.loss.item<float>(), 0);
  EXPECT_EQ(none.d_hidden.abs().sum().item<float>() + none.d_weight.abs().sum().item<float>(), 0);
}

TEST(LinearCrossEntropy, IgnoredRowsCountForNothing) {
  for (const double smoothing : {0.0, 0.1})
    expect_ignored_rows_count_for_nothing({12, 6, 21, 5, at::kFloat, 1.0, smoothing});
}

TEST(LinearCrossEntropy, SmoothingIsLeastWhereTheTargetIsMet) {
  // p = the target: no gradient but for the rounding of p, and the loss is the target's entropy.
  constexpr double kSmoothing = 0.2;
  constexpr std::int64_t kClasses = 21, kLabel = 18;
  const double rest = kSmoothing / kClasses, top = 1 - kSmoothing + rest;
  const at::Tensor hidden = leaf(at::ones({1, 1})), weight = leaf(at::zeros({kClasses, 1}));
  weight.detach()[kLabel][0] = std::log(top / rest);
  const at::Tensor loss =
      linear_cross_entropy_sum(hidden, weight, at::full({1}, kLabel, at::kLong), {.label_smoothing = kSmoothing});
  EXPECT_NEAR(loss.item<double>(), -top * std::log(top) - (kClasses - 1) * rest * std::log(rest), 4 * kUnit);
  const at::Tensor d_weight = gradients(loss, at::ones({}), {weight})[0];
  EXPECT_LE(d_weight.abs().max().item<double>(), 8 * kUnit);
}

TEST(LinearCrossEntropy, OnlyWantedGradientsAreMade) {
  const HeadCase c{.tokens = 9, .width = 4, .vocabulary = 11, .chunk = 4, .dtype = at::kFloat, .scale = 1.0};
  const HeadInputs in(c);
  const HeadRun both = run(c, in);
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
  linear_cross_entropy_sum(hidden, in.weight, in.labels, {.loss_scale = 1.0, .chunk_rows = 4}).backward();
  expect_same_bits(hidden.grad(), both.d_hidden, "frozen head");
  linear_cross_entropy_sum(in.hidden, weight, in.labels, {.loss_scale = 1.0, .chunk_rows = 4}).backward();
  expect_same_bits(weight.grad(), both.d_weight, "frozen body");
}

// Logits that a processor with bf16 products writes past the caches, in rows that it pads.
TEST(LinearCrossEntropy, LargeChunksGiveTheSameBits) {
  const auto run_in = [](std::int64_t chunk) {
    const HeadCase c{
        .tokens = 400, .width = 24, .vocabulary = 30'011, .chunk = chunk, .dtype = at::kBFloat16, .scale = 1.0};
    return run(c, HeadInputs(c));
  };
  const HeadRun large = run_in(0), small = run_in(32);
  expect_same_bits(large.loss, small.loss, "loss");
  if (instruction_set() < InstructionSet::avx512_bf16) return;  // ATen takes other kernels for other sizes
  expect_same_bits(large.d_hidden, small.d_hidden, "hidden");
}

TEST(LinearCrossEntropy, OuterFactorsReachTheGradientsAndBackwardRunsOnce) {
  const HeadCase c{.tokens = 9, .width = 4, .vocabulary = 11, .chunk = 0, .dtype = at::kFloat, .scale = 1.0};
  const HeadInputs in(c);
  const HeadRun plain = run(c, in);
  const at::Tensor hidden = leaf(in.hidden), weight = leaf(in.weight);
  const at::Tensor loss = linear_cross_entropy_sum(hidden, weight, in.labels, {});
  (loss * 4).backward({}, true);
  expect_same_bits(weight.grad(), plain.d_weight * 4, "times four is exact");
  EXPECT_THROW((loss * 4).backward(), Error);
}

TEST(LinearCrossEntropy, ConfidentRowsKeepTheDigitsOfTheirGradient) {
  // p = 1 - 3e-6: taking p - 1 in fp32 would leave two digits.
  const at::Tensor hidden = leaf(at::ones({1, 1})), weight = leaf(at::tensor({14.0F, 1.0F, 0.0F}).unsqueeze(1));
  linear_cross_entropy_sum(hidden, weight, at::zeros({1}, at::kLong), {}).backward();
  const double rest = std::exp(-13.0) + std::exp(-14.0), wanted = -rest / (1 + rest);
  EXPECT_NEAR(weight.grad()[0][0].item<double>(), wanted, 8 * kUnit * -wanted);
}

TEST(LinearCrossEntropy, LogitsNeverExistAtOnce) {
  constexpr std::int64_t kTokens = 2000, kWidth = 16, kVocabulary = 60'000;
  constexpr std::int64_t kLogitBytes = kTokens * kVocabulary * 4, kChunkBytes = std::int64_t{128} << 20;
  const at::Tensor hidden = leaf(random_tensor(1, {kTokens, kWidth})),
                   weight = leaf(random_tensor(2, {kVocabulary, kWidth}));
  const at::Tensor labels = at::zeros({kTokens}, at::kLong);
  constexpr std::int64_t kGradientBytes = (kTokens + kVocabulary) * kWidth * 4, kSmall = 1 << 20;
  // What products pack at a time: of the side that all threads read, and of each thread's own.
  const std::int64_t packed = (1 + at::get_num_threads()) << 20;
  at::Tensor loss;
  const std::int64_t forward = peak_bytes_of([&] { loss = linear_cross_entropy_sum(hidden, weight, labels, {}); });
  EXPECT_LE(forward, kChunkBytes + kGradientBytes + packed + kSmall);
  const std::int64_t in_small_chunks = peak_bytes_of(
      [&] { loss = linear_cross_entropy_sum(hidden, weight, labels, {.label_smoothing = 0.1, .chunk_rows = 10}); });
  EXPECT_LE(in_small_chunks, 10 * kVocabulary * 4 + kGradientBytes + packed + kSmall);
  EXPECT_LE(peak_bytes_of([&] { loss.backward(); }), kSmall) << "backward hands the saved gradients over";
  static_assert(kChunkBytes + kGradientBytes + kSmall < kLogitBytes / 3);
}

TEST(LinearCrossEntropy, TheNumberOfThreadsDoesNotChangeABit) {
  for (const at::ScalarType dtype : kDtypes)
    for (const double smoothing : {0.0, 0.1}) {
      const HeadCase c{200, 48, 3001, 64, dtype, 0.01, smoothing};
      const HeadInputs in(c);
      const auto compute = [&] {
        const HeadRun r = run(c, in);
        return std::vector<at::Tensor>{r.loss, r.d_hidden, r.d_weight};
      };
      expect_same_bits_for_any_thread_count(compute, to_text(c));
    }
}

TEST(LinearCrossEntropy, NanAndInfinityReachTheLoss) {
  for (const float bad : {std::numeric_limits<float>::quiet_NaN(), std::numeric_limits<float>::infinity()})
    for (const std::int64_t place : {0, 17})  // in a full vector and in the tail
      for (const double smoothing : {0.0, 0.1}) {
        at::Tensor weight = at::ones({18, 2});
        weight[place][0] = bad;
        const at::Tensor loss = linear_cross_entropy_sum(at::ones({1, 2}), weight, at::ones({1}, at::kLong),
                                                         {.label_smoothing = smoothing});
        EXPECT_FALSE(std::isfinite(loss.item<float>())) << bad << " at " << place << ", smoothing " << smoothing;
      }
}

TEST(LinearCrossEntropy, LabelsOutsideTheVocabularyAreRefused) {
  for (const int bad : {-1, 5, -99}) {
    const at::Tensor labels = at::tensor({0, -100, bad}, at::kLong);
    for (const bool fused : {true, false}) {
      try {
        if (fused)
          linear_cross_entropy_sum(at::ones({3, 2}), at::ones({5, 2}), labels, {});
        else
          cross_entropy_sum(at::ones({3, 5}), labels, 1.0);
        FAIL() << "accepted " << bad;
      } catch (const Error& error) {
        EXPECT_EQ(error.kind(), ErrorKind::data);
        EXPECT_NE(std::string(error.what()).find(fmt::format("label {} at position 2", bad)), std::string::npos);
      }
    }
  }
  EXPECT_THROW(linear_cross_entropy_sum(at::ones({3, 2}), at::ones({5, 2}), at::zeros({2}, at::kLong), {}), Error);
}

TEST(LinearCrossEntropy, SmoothingIsAShare) {
  for (const double bad : {-0.1, 1.1})
    EXPECT_THROW(linear_cross_entropy_sum(at::ones({1, 2}), at::ones({5, 2}), at::zeros({1}, at::kLong),
                                          {.label_smoothing = bad}),
                 Error);
}

struct ClassCase {
  std::int64_t rows, classes;
  double scale, smoothing;
};

void expect_near_fp64(const ClassCase& c) {
  const std::string what = fmt::format("[{}, {}], smoothing {}", c.rows, c.classes, c.smoothing);
  const at::Tensor given = 3 * random_tensor(1, {c.rows, c.classes});
  const at::Tensor labels = random_labels(2, 2 * c.rows, c.classes).slice(0, 0, 2 * c.rows, 2);  // strided
  const at::Tensor logits = leaf(given), exact_logits = double_leaf(given);
  const at::Tensor loss = cross_entropy_sum(logits, labels, c.scale, c.smoothing);
  // By the definition, not by torch's own label_smoothing.
  const at::Tensor counts = (labels != kIgnoredLabel).to(at::kDouble).unsqueeze(1);
  const at::Tensor one_hot =
      at::zeros({c.rows, c.classes}, at::kDouble).scatter_(1, labels.clamp_min(0).unsqueeze(1), 1.0);
  const double share = c.smoothing / static_cast<double>(c.classes);
  const at::Tensor target = counts * ((1 - c.smoothing) * one_hot + share);
  const at::Tensor wanted = -c.scale * (at::log_softmax(exact_logits, 1) * target).sum();
  const at::Tensor row = 8 * kUnit * (2 + magnitude(given).amax(1, true));
  expect_within(loss, wanted, c.scale * 2 * (row.sum() + static_cast<double>(c.rows) * kUnit * wanted.detach()), what);
  const at::Tensor p = at::softmax(exact(given), 1);
  expect_within(gradients(loss, at::ones({}), {logits})[0],
                gradients(wanted, at::ones({}, at::kDouble), {exact_logits})[0], c.scale * (2 * row * p + 4 * kUnit),
                what + " gradient");
}

TEST(CrossEntropy, LossAndGradientsLieWithinTheRoundingOfFp64) {
  for (const auto& [rows, classes] : {std::pair<std::int64_t, std::int64_t>{1, 2}, {7, 3}, {33, 6}, {64, 77}})
    for (const double scale : {1.0, 0.125, 1.0 / 7})
      for (const double smoothing : {0.0, 0.1, 0.75}) expect_near_fp64({rows, classes, scale, smoothing});
}

}  // namespace
}  // namespace shardtune::testing
