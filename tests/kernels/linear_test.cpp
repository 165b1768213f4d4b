// Linear layers against fp64, and that autograd keeps the weight itself, not a copy.
#include "kernels/linear.hpp"

#include <utility>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>

#include "kernels/instruction_set.hpp"
#include "kernels/side_by_side.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

struct LinearCase {
  std::int64_t tokens, in, out;
  bool has_bias;
};

TEST(Linear, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (const LinearCase& c : {LinearCase{1, 1, 1, true},
                              {3, 5, 7, true},
                              {1, 33, 2, false},
                              {65, 48, 17, true},
                              {130, 384, 96, true},
                              {2, 1003, 31, false},
                              {70, 1100, 549, true},
                              {1030, 40, 33, true},
                              {90, 1100, 1200, true},
                              {0, 8, 4, true}})
    for (const at::ScalarType dtype : kDtypes) {
      const at::Tensor given_x = random_tensor(1, {c.tokens, c.in}, dtype),
                       given_w = random_tensor(2, {c.out, c.in}, dtype);
      const at::Tensor given_b = random_tensor(3, {c.out}, dtype), seed = random_tensor(4, {c.tokens, c.out}, dtype);
      const at::Tensor x = leaf(given_x), w = leaf(given_w), b = leaf(given_b);
      const at::Tensor y = apply_linear(x, w, c.has_bias ? b : at::Tensor());
      const std::string what = fmt::format("[{}, {}] -> {} {}", c.tokens, c.in, c.out, unit_of(dtype));
      EXPECT_EQ(y.scalar_type(), dtype);
      // Sums in fp32 whatever their order; a library may store the product in bf16 before it adds the bias.
      const at::Tensor ax = magnitude(given_x), aw = magnitude(given_w), g = exact(seed), ag = magnitude(seed);
      const at::Tensor product = at::mm(exact(given_x), exact(given_w).t());
      const auto sums = [](std::int64_t terms) { return kUnit * static_cast<double>(terms + 2); };
      const at::Tensor bias = c.has_bias ? exact(given_b) : at::zeros({c.out}, at::kDouble);
      expect_within(y, product + bias, sums(c.in) * (at::mm(ax, aw.t()) + bias.abs()) + unit_of(dtype) * product.abs(),
                    what);
      const auto grads = gradients(y, seed, {x, w, b});
      expect_within(grads[0], at::mm(g, exact(given_w)), sums(c.out) * at::mm(ag, aw), what + " dx");
      expect_within(grads[1], at::mm(g.t(), exact(given_x)), sums(c.tokens) * at::mm(ag.t(), ax), what + " dw");
      if (c.has_bias) expect_within(grads[2], g.sum(0), sums(c.tokens) * ag.sum(0), what + " db");
    }
}

TEST(Linear, WeightsStoredTransposedGiveTheSameResults) {
  for (const at::ScalarType dtype : kDtypes) {
    const at::Tensor given_x = random_tensor(1, {75, 90}, dtype), given_w = random_tensor(2, {70, 90}, dtype);
    const at::Tensor seed = random_tensor(3, {75, 70}, dtype);
    for (const bool is_transposed : {false, true}) {
      const at::Tensor x = leaf(given_x), w = leaf(is_transposed ? given_w.t().contiguous() : given_w);
      const at::Tensor y = apply_linears(x, {{.weight = w, .is_transposed = is_transposed}});
      const auto grads = gradients(y, seed, {x, w});
      const at::Tensor dw = is_transposed ? grads[1].t() : grads[1];
      const at::Tensor ax = magnitude(given_x), aw = magnitude(given_w), g = exact(seed), ag = magnitude(seed);
      expect_within(y, at::mm(exact(given_x), exact(given_w).t()), 92 * kUnit * at::mm(ax, aw.t()), "y");
      expect_within(grads[0], at::mm(g, exact(given_w)), 72 * kUnit * at::mm(ag, aw), "dx");
      expect_within(dw, at::mm(g.t(), exact(given_x)), 77 * kUnit * at::mm(ag.t(), ax), "dw");
    }
  }
}

TEST(Linear, WeightsStoredTransposedGetTheirGradientInTheirLayout) {
  const at::Tensor given_x = random_tensor(1, {75, 90}, at::kBFloat16);
  const at::Tensor given_w = random_tensor(2, {70, 90}, at::kBFloat16);
  const at::Tensor seed = random_tensor(3, {75, 70}, at::kBFloat16);
  const auto weight_gradient = [&](bool is_transposed) {
    const at::Tensor w = leaf(is_transposed ? given_w.t().contiguous() : given_w);
    return gradients(apply_linears(given_x, {{.weight = w, .is_transposed = is_transposed}}), seed, {w})[0];
  };
  EXPECT_TRUE(weight_gradient(true).is_contiguous());
  expect_same_bits_for_any_thread_count([&] { return std::vector<at::Tensor>{weight_gradient(true)}; }, "dw");
  // ATen's products may add in another order in the other layout; their values are tested above.
  if (instruction_set() < InstructionSet::avx512_bf16) return;
  expect_same_bits(weight_gradient(true), weight_gradient(false).t(), "dw");
}

// As the engine's leaves: their gradients are fp32. The last one is large enough to be written past the caches.
TEST(Linear, GradientsInAWiderDtypeHoldTheSameNumbers) {
  for (const auto& [out, in] : {std::pair{77, 90}, {64, 96}, {2080, 2048}})
    for (const bool is_transposed : {false, true})
      for (const at::ScalarType dtype : kDtypes) {
        const at::Tensor x = random_tensor(1, {75, in}, dtype), given_w = random_tensor(2, {out, in}, dtype),
                         seed = random_tensor(4, {75, out}, dtype);
        const auto gradient = [&](bool is_wide) {
          const at::Tensor w = leaf(is_transposed ? given_w.t().contiguous() : given_w);
          if (is_wide) w.set_grad_dtype(at::kFloat);
          apply_linears(x, {{.weight = w, .is_transposed = is_transposed}}).backward(seed);
          return w.grad();
        };
        EXPECT_EQ(gradient(true).scalar_type(), at::kFloat);
        expect_same_bits(gradient(true), gradient(false).to(at::kFloat), fmt::format("{} x {}", out, in));
      }
}

TEST(Linear, GradientsOfSeveralLayersInAWiderDtypeHoldTheSameNumbers) {
  for (const std::int64_t tokens : {0, 75})
    for (const bool has_frozen : {false, true})
      for (const at::ScalarType dtype : kDtypes) {
        const at::Tensor x = random_tensor(1, {tokens, 90}, dtype), seed = random_tensor(4, {tokens, 136}, dtype);
        const auto run = [&](bool is_wide) {
          std::vector<LinearOperands> layers;
          for (const std::int64_t out : {64, 65, 7}) {
            const at::Tensor w = random_tensor(static_cast<std::uint64_t>(out), {out, 90}, dtype);
            layers.push_back({has_frozen && out == 65 ? w : leaf(w)});
            if (is_wide && layers.back().weight.requires_grad()) layers.back().weight.set_grad_dtype(at::kFloat);
          }
          apply_linears(x, layers).backward(seed);
          std::vector<at::Tensor> grads;
          for (const LinearOperands& layer : layers)
            if (layer.weight.requires_grad()) grads.push_back(layer.weight.grad().to(at::kFloat));
          return grads;
        };
        expect_same_bits(run(true), run(false), "dw");
      }
}

TEST(Linear, BiasGradientOfBf16IsSummedInFp32) {
  const at::Tensor x = leaf(at::ones({5000, 2}, at::kBFloat16)), w = leaf(at::ones({3, 2}, at::kBFloat16));
  const at::Tensor b = leaf(at::zeros({3}, at::kBFloat16)), y = apply_linear(x, w, b);
  const auto grads = gradients(y, at::ones_like(y), {w, b});
  for (const at::Tensor& grad : grads)
    expect_within(grad, at::full(grad.sizes(), 5000.0, at::kDouble), at::zeros({1}, at::kDouble), "sum of 5000 ones");
}

TEST(Linear, BackwardReadsTheWeightOfThatMoment) {
  // A sharded weight is freed after forward and gathered again before backward: a saved copy would defeat that.
  const at::Tensor x = leaf(random_tensor(1, {4, 6})), w = leaf(random_tensor(2, {5, 6})), b = leaf(at::zeros({5}));
  const at::Tensor seed = random_tensor(3, {4, 5}), y = apply_linear(x, w, b);
  w.variable_data().mul_(2);
  expect_within(gradients(y, seed, {x})[0], at::mm(exact(seed), exact(w)),
                8 * kUnit * at::mm(magnitude(seed), magnitude(w)), "dx");
}

// Long sums are what a library shares among threads: over inputs (y), outputs (dx), tokens (dw).
TEST(Linear, TheNumberOfThreadsDoesNotChangeABit) {
  for (const LinearCase& c :
       {LinearCase{3000, 100, 90, true}, {2100, 768, 8, false}, {50, 2600, 70, true}, {70, 30, 2500, true}})
    for (const at::ScalarType dtype : kDtypes)
      expect_same_bits_for_any_thread_count(
          [&] {
            const at::Tensor x = leaf(random_tensor(1, {c.tokens, c.in}, dtype)),
                             w = leaf(random_tensor(2, {c.out, c.in}, dtype));
            const at::Tensor b = leaf(random_tensor(3, {c.out}, dtype)),
                             y = apply_linear(x, w, c.has_bias ? b : at::Tensor());
            auto all = gradients(y, random_tensor(4, {c.tokens, c.out}, dtype),
                                 c.has_bias ? std::vector{x, w, b} : std::vector{x, w});
            all.push_back(y);
            return all;
          },
          fmt::format("[{}, {}] -> {} {}", c.tokens, c.in, c.out, unit_of(dtype)));
}

TEST(Linear, LayersOfOneInputAreOneProduct) {
  for (const bool has_bias : {true, false})
    for (const std::vector<std::int64_t>& outs : std::vector<std::vector<std::int64_t>>{{40, 7, 65}, {32, 64, 16}})
      for (const at::ScalarType dtype : kDtypes) {
        const at::Tensor x = leaf(random_tensor(1, {75, 90}, dtype)), seed = random_tensor(4, {75, 112}, dtype);
        const at::Tensor all_w = random_tensor(2, {112, 90}, dtype), all_b = random_tensor(3, {112}, dtype);
        std::vector<LinearOperands> layers;
        std::vector<at::Tensor> inputs{x};
        for (std::int64_t i = 0, at = 0; i < 3; at += outs[static_cast<std::size_t>(i++)]) {
          const auto cut = [&](const at::Tensor& all) {
            return leaf(all.narrow(0, at, outs[static_cast<std::size_t>(i)]));
          };
          layers.push_back({cut(all_w), has_bias ? cut(all_b) : at::Tensor()});
          inputs.push_back(layers.back().weight);
          if (has_bias) inputs.push_back(layers.back().bias);
        }
        const auto parts = split_columns(apply_linears(x, layers), outs);
        const auto grads = gradients(at::cat(parts, 1), seed, inputs);
        const at::Tensor one_x = leaf(x), one_w = leaf(all_w), one_b = leaf(all_b);
        const at::Tensor y = apply_linear(one_x, one_w, has_bias ? one_b : at::Tensor());
        const auto wanted = gradients(
            y, seed, has_bias ? std::vector<at::Tensor>{one_x, one_w, one_b} : std::vector<at::Tensor>{one_x, one_w});
        expect_same_bits(at::cat(parts, 1), y, "y");
        expect_same_bits(grads[0], wanted[0], "dx");
        std::vector<at::Tensor> dw, db;
        for (std::size_t i = 1; i < grads.size(); ++i) (has_bias && i % 2 == 0 ? db : dw).push_back(grads[i]);
        expect_same_bits(at::cat(dw), wanted[1], "dw");
        if (has_bias) expect_same_bits(at::cat(db), wanted[2], "db");
      }
}

TEST(Linear, FrozenLayersAmongOthersGetNoGradient) {
  for (const at::ScalarType dtype : kDtypes) {
    const at::Tensor x = leaf(random_tensor(1, {9, 6}, dtype)), seed = random_tensor(4, {9, 12}, dtype);
    // Of three layers the first weight and the last two biases are frozen.
    const std::vector<bool> trains_weight{false, true, true}, trains_bias{true, false, false};
    std::vector<LinearOperands> layers;
    for (std::size_t i = 0; i < 3; ++i) {
      const at::Tensor w = random_tensor(10 + i, {4, 6}, dtype), b = random_tensor(20 + i, {4}, dtype);
      layers.push_back({trains_weight[i] ? leaf(w) : w, trains_bias[i] ? leaf(b) : b});
    }
    apply_linears(x, layers).backward(seed);
    for (std::size_t i = 0; i < 3; ++i) {
      const at::Tensor g = exact(seed).narrow(1, static_cast<std::int64_t>(i) * 4, 4), &dw = layers[i].weight.grad(),
                       &db = layers[i].bias.grad();
      ASSERT_EQ(dw.defined(), trains_weight[i]);
      ASSERT_EQ(db.defined(), trains_bias[i]);
      if (dw.defined()) {
        expect_within(dw, at::mm(g.t(), exact(x)), 16 * kUnit * at::mm(g.abs().t(), magnitude(x)), "dw");
        EXPECT_EQ(dw.storage().nbytes(), static_cast<std::size_t>(dw.nbytes()))
            << "nothing of the frozen layer is held";
      }
      if (db.defined()) expect_within(db, g.sum(0), 16 * kUnit * g.abs().sum(0), "db");
    }
  }
}

TEST(Linear, AnActivationInTheStoreChangesNoBit) {
  for (const Activation activation : {Activation::gelu_erf, Activation::gelu_tanh, Activation::relu})
    for (const bool is_transposed : {false, true})
      for (const at::ScalarType dtype : kDtypes) {
        const at::Tensor given_w = random_tensor(2, {77, 90}, dtype), seed = random_tensor(4, {75, 77}, dtype);
        const auto run = [&](bool at_once) {
          const at::Tensor x = leaf(random_tensor(1, {75, 90}, dtype)), b = leaf(random_tensor(3, {77}, dtype));
          const at::Tensor w = leaf(is_transposed ? given_w.t().contiguous() : given_w);
          const LinearOperands layer{w, b, is_transposed};
          const at::Tensor y =
              at_once ? apply_activated_linear(x, layer, activation) : activate(apply_linears(x, {layer}), activation);
          auto all = gradients(y, seed, {x, w, b});
          all.push_back(y);
          return all;
        };
        const auto own = run(true), wanted = run(false);
        for (std::size_t i = 0; i < own.size(); ++i) expect_same_bits(own[i], wanted[i], fmt::format("tensor {}", i));
      }
}

// Large enough to be written past the caches, as whole rows of blocks or whole columns of them.
TEST(Linear, ALargeResultHoldsTheBitsOfItsParts) {
  if (instruction_set() < InstructionSet::avx512_bf16) return;  // ATen takes other kernels for other sizes
  constexpr std::int64_t kRow = 37, kRows = 70;
  for (const auto& [tokens, out] : {std::pair{1060, 8224}, {4100, 2080}}) {
    const at::Tensor x = random_tensor(1, {tokens, 40}, at::kBFloat16), w = random_tensor(2, {out, 40}, at::kBFloat16);
    const at::Tensor b = random_tensor(3, {out}, at::kBFloat16), few = x.narrow(0, kRow, kRows);
    expect_same_bits(apply_linear(x, w, b).narrow(0, kRow, kRows), apply_linear(few, w, b), "with bias");
    expect_same_bits(apply_activated_linear(x, {w, b}, Activation::gelu_tanh).narrow(0, kRow, kRows),
                     apply_activated_linear(few, {w, b}, Activation::gelu_tanh), "activated");
  }
}

TEST(SideBySide, OnlyWhatLiesSideBySideIsAView) {
  const at::Tensor all = random_tensor(1, {6, 10});
  const auto columns = [&](std::int64_t at, std::int64_t n) { return all.narrow(1, at, n); };
  const auto expect = [&](const std::vector<at::Tensor>& parts, bool is_view) {
    const at::Tensor made = side_by_side(parts);
    expect_same_bits(made, at::cat(parts, 1), "cat");
    EXPECT_EQ(made.is_alias_of(all), is_view);
  };
  expect({columns(0, 3), columns(3, 2), columns(5, 5)}, true);
  expect({columns(0, 3), columns(5, 5), columns(3, 2)}, false);
  expect({columns(0, 3), columns(4, 6)}, false);
  expect({columns(0, 3), columns(3, 3)}, false);  // not the whole rows
  expect({columns(0, 3), columns(3, 7).clone()}, false);
}

TEST(SideBySide, HeadsAreViewsAndTheirGradientsComeTogether) {
  const at::Tensor x = leaf(random_tensor(1, {6, 20})), seed = random_tensor(2, {6, 20});
  const auto parts = split_heads(x, {3, 1, 1});
  for (std::size_t i = 0, first = 0; i < 3; first += i++ == 0 ? 3 : 1) {
    const std::int64_t heads = i == 0 ? 3 : 1;
    EXPECT_EQ(parts[i].sizes(), at::IntArrayRef({6, heads, 4}));
    EXPECT_TRUE(parts[i].is_alias_of(x));
    expect_same_bits(parts[i].reshape({6, -1}), x.narrow(1, 4 * static_cast<std::int64_t>(first), 4 * heads), "part");
  }
  const auto weighted = [&](std::size_t i, std::int64_t at) {
    return (parts[i].reshape({6, -1}) * seed.narrow(1, at, 4 * parts[i].size(1))).sum();
  };
  expect_same_bits(gradients(weighted(0, 0) + weighted(1, 12) + weighted(2, 16), at::ones({}), {x})[0], seed, "dx");
  // Cut from one tensor, as attention's gradients are.
  const auto cut = seed.view({6, 5, 4}).split_with_sizes({3, 1, 1}, 1);
  const auto of_cut = torch::autograd::grad(split_heads(x, {3, 1, 1}), {x}, cut);
  EXPECT_TRUE(of_cut[0].is_alias_of(seed));
  expect_same_bits(of_cut[0], seed, "dx of views");
}

TEST(Linear, RepeatedRunsGiveTheSameBits) {
  for (const at::ScalarType dtype : kDtypes) {
    const auto compute = [&] {
      const at::Tensor x = leaf(random_tensor(1, {300, 129}, dtype)), w = leaf(random_tensor(2, {257, 129}, dtype));
      const at::Tensor b = leaf(random_tensor(3, {257}, dtype)), y = apply_linear(x, w, b);
      auto all = gradients(y, random_tensor(4, {300, 257}, dtype), {x, w, b});
      all.push_back(y);
      return all;
    };
    expect_same_bits_when_repeated(compute, "linear");
  }
}

}  // namespace
}  // namespace shardtune::testing
