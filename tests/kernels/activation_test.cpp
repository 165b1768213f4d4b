// Point-wise activations and the gated MLP's middle, against their formulas in fp64.
#include "kernels/activation.hpp"

#include <cmath>
#include <tuple>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "kernels/gated_mlp.hpp"
#include "tests/kernels/support.hpp"

namespace shardtune::testing {
namespace {

constexpr double kTanhFactor = 0.7978845608028654;  // sqrt(2 / pi)

at::Tensor formula(const at::Tensor& x, Activation activation) {
  switch (activation) {
    case Activation::gelu_erf: return 0.5 * x * (1 + at::erf(x / std::sqrt(2.0)));
    case Activation::gelu_tanh: return 0.5 * x * (1 + at::tanh(kTanhFactor * (x + 0.044715 * x.pow(3))));
    case Activation::relu: return x * (x > 0).to(at::kDouble);
    case Activation::silu: return x / (1 + at::exp(-x));
    case Activation::tanh: return at::tanh(x);
  }
  return {};
}

TEST(Activation, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (const Activation activation :
       {Activation::gelu_erf, Activation::gelu_tanh, Activation::relu, Activation::silu, Activation::tanh})
    for (const at::ScalarType dtype : kDtypes)
      for (const std::int64_t numel : {0, 1, 37, 5003}) {
        const at::Tensor given = 2 * random_tensor(1, {numel}, dtype), seed = random_tensor(2, {numel}, dtype);
        const at::Tensor x = leaf(given), exact_x = double_leaf(given);
        const at::Tensor y = activate(x, activation), wanted = formula(exact_x, activation);
        const std::string what = fmt::format("activation {} of {} numbers", static_cast<int>(activation), numel);
        EXPECT_EQ(y.scalar_type(), dtype);
        // A dozen roundings of terms no larger than 1 + |x| (times the tanh argument's slope in the gradient).
        const at::Tensor size = magnitude(given), slope = kTanhFactor * (1 + 3 * 0.044715 * size.square());
        expect_within(y, wanted, 12 * kUnit * size, what);
        // tanh's backward pass starts from its rounded output.
        const at::Tensor rounded_output = 2 * unit_of(dtype) * at::tanh(size).square();
        const at::Tensor slack = magnitude(seed) * (12 * kUnit * (1 + size * (1 + slope)) +
                                                    (activation == Activation::tanh ? 1.0 : 0.0) * rounded_output);
        expect_within(gradients(y, seed, {x})[0], gradients(wanted, exact(seed), {exact_x})[0], slack, what + " dx");
      }
}

TEST(Activation, FarValuesOfGeluSaturateAndNanStays) {
  for (const Activation activation : {Activation::gelu_erf, Activation::gelu_tanh}) {
    const at::Tensor x = leaf(at::tensor({-1e30F, -30.0F, 30.0F, 1e30F, std::nanf(""), -0.0F}));
    const at::Tensor y = activate(x, activation), slope = gradients(y, at::ones({6}), {x})[0];
    for (const auto& [index, value, derivative] :
         {std::tuple{0, 0.0F, 0.0F}, {1, 0.0F, 0.0F}, {2, 30.0F, 1.0F}, {3, 1e30F, 1.0F}}) {
      EXPECT_EQ(y[index].item<float>(), value) << index;
      EXPECT_EQ(slope[index].item<float>(), derivative) << index;
    }
    EXPECT_TRUE(std::isnan(y[4].item<float>()) && std::isnan(slope[4].item<float>()));
    EXPECT_EQ(slope[5].item<float>(), 0.5F);
  }
}

// Also of every second column, as where a gated MLP's halves are parts of one product.
TEST(Activation, ThreadCountChangesNoBit) {
  const at::Tensor given = random_tensor(1, {1001, 202}), seed = random_tensor(2, {1001, 101});
  for (const Activation activation :
       {Activation::gelu_erf, Activation::gelu_tanh, Activation::relu, Activation::silu, Activation::tanh})
    for (const bool is_dense : {true, false})
      expect_same_bits_for_any_thread_count(
          [&] {
            const at::Tensor x = leaf(given), part = x.narrow(1, 0, 101),
                             y = activate(is_dense ? part.contiguous() : part, activation);
            return std::vector<at::Tensor>{y.contiguous(), gradients(y, seed, {x})[0]};
          },
          fmt::format("activation {}, {}", static_cast<int>(activation), is_dense ? "dense" : "part of a row"));
}

TEST(Activation, HuggingFacesNamesAreKnown) {
  for (const char* name : {"gelu", "gelu_python"}) EXPECT_EQ(find_activation(name), Activation::gelu_erf) << name;
  for (const char* name : {"gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh"})
    EXPECT_EQ(find_activation(name), Activation::gelu_tanh) << name;
  EXPECT_EQ(find_activation("swish"), Activation::silu);
  for (const char* name : {"quick_gelu", "gelu_10", "GELU", "", "gelu "})
    EXPECT_FALSE(find_activation(name).has_value()) << name;
  for (const char* name : {"gelu", "relu", "silu", "tanh"})
    EXPECT_NE(activation_names().find(name), std::string::npos) << name;
}

struct GatedRun {
  at::Tensor out, d_gate, d_up;
};

GatedRun run_gated(const at::Tensor& gate, const at::Tensor& up, const at::Tensor& seed, bool reference) {
  const at::Tensor both = at::cat({gate, up}, 1), x = reference ? double_leaf(both) : leaf(both);
  const at::Tensor out = reference ? silu_and_mul_reference(x) : silu_and_mul(x);
  const auto halves = gradients(out, seed, {x})[0].chunk(2, 1);
  return {out, halves[0], halves[1]};
}

TEST(GatedMlp, ValuesAndGradientsLieWithinTheRoundingOfFp64) {
  for (const std::vector<std::int64_t>& shape :
       std::vector<std::vector<std::int64_t>>{{0, 8}, {1, 1}, {1, 16}, {3, 7}, {5, 33}, {65, 48}, {2, 1003}})
    for (const at::ScalarType dtype : kDtypes) {
      const at::Tensor gate = 3 * random_tensor(1, shape, dtype), up = random_tensor(2, shape, dtype);
      const at::Tensor seed = random_tensor(3, shape, dtype);
      const GatedRun own = run_gated(gate, up, seed, false), wanted = run_gated(gate, up, seed, true);
      const std::string what = fmt::format("[{}, {}]", shape[0], shape[1]);
      EXPECT_EQ(own.out.scalar_type(), dtype);
      // The exponential is off by four units at most, a dozen operations follow; 1 - s is a difference of terms up
      // to 1.
      const at::Tensor s = at::sigmoid(exact(gate)), x = magnitude(gate), g = magnitude(seed), u = magnitude(up);
      expect_within(own.out, wanted.out, 16 * kUnit * x * s * u, what);
      expect_within(own.d_up, wanted.d_up, 16 * kUnit * g * x * s, what + " d_up");
      expect_within(own.d_gate, wanted.d_gate, 16 * kUnit * g * u * s * (1 + x), what + " d_gate");
    }
}

TEST(GatedMlp, FarValuesSaturateAndNanStays) {
  const at::Tensor gate = at::tensor({-1e4F, -88.0F, 88.0F, 1e4F, std::nanf(""), -0.0F}).unsqueeze(0),
                   up = at::ones({1, 6});
  const GatedRun run = run_gated(gate, up, up, false);
  const auto at_index = [](const at::Tensor& t, int i) { return t[0][i].item<float>(); };
  EXPECT_EQ(at_index(run.out, 0), 0);
  EXPECT_NEAR(at_index(run.out, 1), 0, 1e-35);
  EXPECT_EQ(at_index(run.out, 2), 88);
  EXPECT_EQ(at_index(run.out, 3), 1e4F);
  EXPECT_EQ(at_index(run.d_gate, 0), 0);
  EXPECT_EQ(at_index(run.d_gate, 3), 1);
  EXPECT_TRUE(std::isnan(at_index(run.out, 4)) && std::isnan(at_index(run.d_gate, 4)));
  EXPECT_EQ(at_index(run.d_gate, 5), 0.5F);
}

TEST(GatedMlp, StridesAndThreadCountChangeNoBit) {
  const at::Tensor wide = random_tensor(1, {310, 3 * 333}), seed = random_tensor(2, {310, 333});
  const auto compute = [&](bool dense) {
    const at::Tensor part = wide.slice(1, 333), x = (dense ? part.contiguous() : part).detach().requires_grad_(true);
    const at::Tensor out = silu_and_mul(x);
    return std::vector<at::Tensor>{out, gradients(out, seed, {x})[0]};
  };
  const auto dense = compute(true), strided = compute(false);
  for (std::size_t i = 0; i < dense.size(); ++i) expect_same_bits(strided[i], dense[i], "strided");
  expect_same_bits_for_any_thread_count([&] { return compute(true); }, "silu_and_mul");
}

}  // namespace
}  // namespace shardtune::testing
