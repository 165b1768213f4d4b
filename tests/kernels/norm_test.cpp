// Layer norm and RMS norm, alone and of a residual's sum: values and gradients against fp64, tails, sums in fp32,
// thread counts; the fused sum against what it is made of, bit for bit.
#include "kernels/norm.hpp"

#include <cmath>
#include <utility>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "core/error.hpp"
#include "kernels/dropout.hpp"
#include "tests/kernels/support.hpp"
#include "tests/support/error_of.hpp"

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

// Which results of the fused sum the loss depends on.
enum class Taken { both, normed, sum };

struct SumInputs {
  NormCase c;
  NormInputs norm;  // x is the residual
  at::Tensor branch, sum_seed;
  DropoutSite site;
  Taken taken = Taken::both;
  SumInputs(const NormCase& norm_case, double probability)
      : c(norm_case),
        norm(norm_case),
        branch(random_tensor(5, {c.tokens, c.width}, c.dtype)),
        sum_seed(random_tensor(6, {c.tokens, c.width}, c.dtype)),
        site{.probability = probability, .key = 31} {}
};

struct SumRun {
  at::Tensor normed, sum, dresidual, dbranch, dw, db;
  std::vector<at::Tensor> all() const {
    std::vector<at::Tensor> tensors{normed, sum, dresidual, dbranch};
    if (dw.defined()) tensors.push_back(dw);
    if (db.defined()) tensors.push_back(db);
    return tensors;
  }
};

NormedSum apply_sum(const SumInputs& in, const ResidualAdd& add, const at::Tensor& w, const at::Tensor& b) {
  return in.c.has_mean ? add_layer_norm(add, w, b, in.c.eps) : add_rms_norm(add, w, in.c.eps);
}

SumRun run_sum(const SumInputs& in, bool is_fused) {
  const at::Tensor residual = leaf(in.norm.x), branch = leaf(in.branch), w = leaf(in.norm.w), b = leaf(in.norm.b);
  NormedSum result;
  if (is_fused) {
    result = apply_sum(in, {residual, branch, in.site}, w, b);
  } else {
    result.sum = residual + dropout(branch, in.site);
    result.normed = apply(in.c, result.sum, w, b, false);
  }
  std::vector<at::Tensor> outputs, seeds;
  if (in.taken != Taken::sum) outputs.push_back(result.normed), seeds.push_back(in.norm.seed);
  if (in.taken != Taken::normed) outputs.push_back(result.sum), seeds.push_back(in.sum_seed);
  torch::autograd::backward(outputs, seeds);
  SumRun run{result.normed, result.sum, residual.grad(), branch.grad(), {}, {}};
  if (in.taken != Taken::sum) run.dw = w.grad();
  if (in.taken != Taken::sum && in.c.has_mean) run.db = b.grad();
  return run;
}

TEST(ResidualNorm, EqualsSumAndNormOneAfterTheOtherBitForBit) {
  for (const NormCase& c : cases())
    for (const double probability : {0.0, 0.3, 1.0})
      for (const Taken taken : {Taken::both, Taken::normed, Taken::sum}) {
        SumInputs in(c, probability);
        in.taken = taken;
        expect_same_bits(run_sum(in, true).all(), run_sum(in, false).all(),
                         fmt::format("{} p {}, taken {}", to_text(c), probability, static_cast<int>(taken)));
      }
}

TEST(ResidualNorm, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (const NormCase& c : cases())
    for (const double probability : {0.0, 0.3}) {
      const SumInputs in(c, probability);
      const SumRun own = run_sum(in, true);
      const double unit = unit_of(c.dtype);
      const at::Tensor mask = exact(dropout(at::ones({c.tokens, c.width}), in.site)), kept = mask * exact(in.branch);
      const at::Tensor sum = exact(in.norm.x) + kept;
      // The product is rounded twice (fp32, dtype), the sum of two numbers once before the dtype's own.
      expect_within(own.sum, sum, 2 * unit * kept.abs() + kUnit * sum.abs(), to_text(c) + " sum");
      // What is normalised is the rounded sum.
      NormInputs norm = in.norm;
      norm.x = own.sum.detach();
      const NormRun wanted = run(c, norm, true);
      const NormSlack slack(c, norm);
      expect_within(own.normed, wanted.y, slack.y, to_text(c) + " normed");
      expect_within(own.dw, wanted.dw, slack.dw, to_text(c) + " dw");
      if (c.has_mean) expect_within(own.db, wanted.db, slack.db, to_text(c) + " db");
      // The gradient of the norm is rounded before that of the sum is added to it.
      const at::Tensor total = wanted.dx + exact(in.sum_seed);
      const at::Tensor total_slack =
          slack.dx * (1 + unit) + unit * wanted.dx.abs() + half_denormal_step(c.dtype) + kUnit * total.abs();
      expect_within(own.dresidual, total, total_slack, to_text(c) + " dresidual");
      expect_within(own.dbranch, mask * total, mask * (total_slack * (1 + unit) + (unit + kUnit) * total.abs()),
                    to_text(c) + " dbranch");
    }
}

TEST(ResidualNorm, StridedInputsAndThreadCountsChangeNoBit) {
  for (const bool has_mean : {false, true})
    for (const at::ScalarType dtype : kDtypes) {
      const NormCase c{.tokens = 650, .width = 333, .dtype = dtype, .has_mean = has_mean, .eps = 1e-6};
      SumInputs in(c, 0.2);
      const std::vector<at::Tensor> dense = run_sum(in, true).all();
      for (at::Tensor* tensor : {&in.norm.x, &in.branch, &in.norm.seed, &in.sum_seed})
        *tensor = tensor->t().contiguous().t();
      expect_same_bits(run_sum(in, true).all(), dense, to_text(c) + " strided");
      expect_same_bits_for_any_thread_count([&] { return run_sum(in, true).all(); }, to_text(c));
    }
}

TEST(ResidualNorm, HoldsItsResultsAndTheStatisticsOnly) {
  const NormCase c{.tokens = 300, .width = 64, .dtype = at::kBFloat16, .has_mean = true, .eps = 1e-6};
  const SumInputs in(c, 0.2);
  const at::Tensor residual = leaf(in.norm.x), branch = leaf(in.branch), w = leaf(in.norm.w), b = leaf(in.norm.b);
  NormedSum result;
  const std::int64_t peak = peak_bytes_of([&] { result = apply_sum(in, {residual, branch, in.site}, w, b); });
  EXPECT_EQ(peak, static_cast<std::int64_t>(result.sum.nbytes() + result.normed.nbytes()) + 2 * 4 * c.tokens);
}

TEST(ResidualNorm, ResidualAndBranchThatDoNotFitAreRefused) {
  const at::Tensor w = at::ones({4}), x = at::ones({3, 4});
  for (const at::Tensor& branch : {at::ones({1, 4}), at::ones({3, 4}, at::kBFloat16)})
    EXPECT_NE(testing_support::error_of(ErrorKind::internal, [&] { add_rms_norm({x, branch}, w, 1e-6); }), "");
}

}  // namespace
}  // namespace shardtune::testing
