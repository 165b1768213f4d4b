// Layer norm and RMS norm: values and gradients against fp64, tails, sums in fp32, thread counts.
#include "kernels/norm.hpp"

#include <cmath>
#include <utility>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

struct NormCase {
  std::int64_t tokens, width;
  at::ScalarType dtype;
  bool has_mean;  // layer norm, else RMS norm
  double eps;
};

std::string to_text(const NormCase& c) {
  return fmt::format("{} [{}, {}] {}", c.has_mean ? "layer_norm" : "rms_norm", c.tokens, c.width,
                     at::toString(c.dtype));
}

std::vector<NormCase> cases() {
  constexpr std::pair<std::int64_t, std::int64_t> kShapes[] = {{1, 1},    {1, 16},  {3, 5},    {65, 17}, {64, 48},
                                                               {130, 33}, {7, 384}, {2, 1003}, {0, 24},  {200, 100}};
  std::vector<NormCase> all;
  for (const auto& [tokens, width] : kShapes)
    for (const at::ScalarType dtype : kDtypes)
      for (const bool has_mean : {false, true})
        all.push_back({tokens, width, dtype, has_mean, has_mean ? 1e-12 : 1e-6});
  return all;
}

struct NormRun {
  at::Tensor y, dx, dw, db;
};

at::Tensor apply(const NormCase& c, const at::Tensor& x, const at::Tensor& w, const at::Tensor& b, bool reference) {
  if (c.has_mean) return reference ? layer_norm_reference(x, w, b, c.eps) : layer_norm(x, w, b, c.eps);
  return reference ? rms_norm_reference(x, w, c.eps) : rms_norm(x, w, c.eps);
}

struct NormInputs {
  at::Tensor x, w, b, seed;
  explicit NormInputs(const NormCase& c)
      : x(random_tensor(1, {c.tokens, c.width}, c.dtype)),
        w(random_tensor(2, {c.width}, c.dtype)),
        b(random_tensor(3, {c.width}, c.dtype)),
        seed(random_tensor(4, {c.tokens, c.width}, c.dtype)) {}
};

NormRun run(const NormCase& c, const NormInputs& in, bool reference) {
  const auto make_leaf = reference ? double_leaf : leaf;
  const at::Tensor x = make_leaf(in.x), w = make_leaf(in.w), b = make_leaf(in.b);
  NormRun result;
  result.y = apply(c, x, w, b, reference);
  const auto grads = gradients(result.y, in.seed, {x, w, b});
  result.dx = grads[0];
  result.dw = grads[1];
  if (c.has_mean) result.db = grads[2];
  return result;
}

// fp32 roundings: a lane adds D / 16 products, then a handful of operations.
double row_roundings(const NormCase& c) { return static_cast<double>(c.width) / 16 + 12; }

// How much an error of one unit in every fp32 operation moves the normalised rows, their weighted sums and gradients.
struct NormSlack {
  at::Tensor y, dx, dw, db;
  NormSlack(const NormCase& c, const NormInputs& in) {
    const at::Tensor x = exact(in.x), w = magnitude(in.w), b = magnitude(in.b), g = magnitude(in.seed);
    const at::Tensor mean = c.has_mean ? x.mean(-1, true) : at::zeros({c.tokens, 1}, at::kDouble);
    const at::Tensor rstd = ((x - mean).square().mean(-1, true) + c.eps).rsqrt();
    // Terms behind a centred value, and behind the deviation they are divided by.
    const at::Tensor spread = c.has_mean ? x.abs() + x.abs().mean(-1, true) : x.abs();
    const at::Tensor n = (x - mean).abs() * rstd;
    const at::Tensor deviation = 1 + rstd * spread.square().mean(-1, true).sqrt();
    const at::Tensor n_terms = spread * rstd + n * deviation;
    const double k = row_roundings(c) * kUnit;
    y = k * (n_terms * w + b);
    const at::Tensor gw = g * w;
    const at::Tensor dots = (gw * n).mean(-1, true), dot_terms = (gw * (n + n_terms)).mean(-1, true);
    const at::Tensor sums = c.has_mean ? gw.mean(-1, true) : at::zeros_like(dots);
    dx = k * rstd * ((gw + sums + n * dots) * (1 + deviation) + n_terms * dots + n * dot_terms);
    // 64 rows are added in turn, then the blocks.
    const double rows = 64 + static_cast<double>(c.tokens) / 64 + 4;
    dw = kUnit * rows * (g * n).sum(0) + k * (g * n_terms).sum(0);
    db = kUnit * rows * g.sum(0);
  }
};

TEST(Norm, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (const NormCase& c : cases()) {
    const NormInputs in(c);
    const NormRun own = run(c, in, false), wanted = run(c, in, true);
    const NormSlack slack(c, in);
    EXPECT_EQ(own.y.scalar_type(), c.dtype);
    expect_within(own.y, wanted.y, slack.y, to_text(c) + " y");
    expect_within(own.dx, wanted.dx, slack.dx, to_text(c) + " dx");
    expect_within(own.dw, wanted.dw, slack.dw, to_text(c) + " dw");
    if (c.has_mean) expect_within(own.db, wanted.db, slack.db, to_text(c) + " db");
  }
}

TEST(Norm, RowsWithAnOffsetKeepTheirDigits) {
  // Mean 100, deviation 1: computing E[x^2] - E[x]^2 in fp32 would lose four digits.
  const NormCase c{.tokens = 5, .width = 250, .dtype = at::kFloat, .has_mean = true, .eps = 1e-12};
  NormInputs in(c);
  in.x = in.x + 100;
  expect_within(run(c, in, false).y, run(c, in, true).y, NormSlack(c, in).y, "offset");
}

TEST(Norm, WeightGradientsOfBf16AreSummedInFp32) {
  // A bf16 sum of thousands of equal terms would stop growing at 256 of them.
  for (const bool has_mean : {false, true}) {
    const NormCase c{.tokens = 5000, .width = 2, .dtype = at::kBFloat16, .has_mean = has_mean, .eps = 1e-6};
    NormInputs in(c);
    in.x = at::tensor({1.0, -1.0}).expand({c.tokens, 2}).to(at::kBFloat16).contiguous();
    in.seed = at::ones_like(in.x);
    const NormRun own = run(c, in, false), wanted = run(c, in, true);
    expect_within(own.dw, wanted.dw, NormSlack(c, in).dw, "dw");
    if (has_mean) expect_within(own.db, wanted.db, NormSlack(c, in).db, "db");
  }
}

TEST(Norm, StridedInputsGiveTheSameBits) {
  for (const bool has_mean : {false, true}) {
    const NormCase c{.tokens = 9, .width = 21, .dtype = at::kFloat, .has_mean = has_mean, .eps = 1e-6};
    NormInputs in(c);
    const NormRun dense = run(c, in, false);
    in.x = in.x.t().contiguous().t();
    in.seed = in.seed.t().contiguous().t();
    const NormRun strided = run(c, in, false);
    expect_same_bits(strided.y, dense.y, "y");
    expect_same_bits(strided.dx, dense.dx, "dx");
    expect_same_bits(strided.dw, dense.dw, "dw");
  }
}

TEST(Norm, ThreadCountChangesNoBit) {
  for (const bool has_mean : {false, true})
    for (const at::ScalarType dtype : kDtypes) {
      const NormCase c{.tokens = 2600, .width = 1003, .dtype = dtype, .has_mean = has_mean, .eps = 1e-6};
      const NormInputs in(c);
      const auto compute = [&] {
        const NormRun r = run(c, in, false);
        std::vector<at::Tensor> all{r.y, r.dx, r.dw};
        if (has_mean) all.push_back(r.db);
        return all;
      };
      expect_same_bits_for_any_thread_count(compute, to_text(c));
    }
}

}  // namespace
}  // namespace shardtune::testing
