// Parity with transformers on the recorded cases of tests/golden.
#include "tests/models/golden.hpp"

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>

#include "kernels/adamw.hpp"
#include "models/unit.hpp"

namespace shardtune::testing {
namespace {

double labelled(const Batch& batch) { return (batch.labels != -100).sum().item<double>(); }

// Calls every layer twice and keeps the second result, as recomputation does: layers must be pure.
class TwiceRunner : public UnitRunner {
 public:
  Tensors run(Unit& /*unit*/, const Tensors& inputs, const Forward& forward) override {
    forward(inputs);
    return forward(inputs);
  }
};

double max_difference(const at::Tensor& a, const at::Tensor& b) { return (a - b).abs().max().item<double>(); }

class GoldenCase : public ::testing::TestWithParam<const char*> {
 protected:
  Golden golden_ = load_golden(GetParam());
  PlainRunner runner_;
  ModelOutput forward(const Batch& batch, ForwardOptions options = {}, ForwardContext context = {}) {
    options.label_smoothing = golden_.label_smoothing;
    return golden_.model->forward(batch, runner_, context, options);
  }
  void clear_gradients() {
    for (Parameter* parameter : all_parameters(*golden_.model)) parameter->value.mutable_grad().reset();
  }
  std::map<std::string, at::Tensor> gradients() {
    std::map<std::string, at::Tensor> grads;
    for (Parameter* p : all_parameters(*golden_.model)) {
      EXPECT_TRUE(p->value.grad().defined()) << p->name << " has no gradient";
      grads[p->name] = p->value.grad().clone();
    }
    return grads;
  }
};

void expect_close_gradients(const std::map<std::string, at::Tensor>& ours,
                            const std::map<std::string, at::Tensor>& expected, double relative, double of_global) {
  double square = 0;
  for (const auto& [name, grad] : expected) square += std::pow(grad.norm().item<double>(), 2);
  ASSERT_GT(square, 0);
  ASSERT_EQ(ours.size(), expected.size());
  for (const auto& [name, grad] : expected) {
    const double difference = (ours.at(name) - grad).norm().item<double>();
    EXPECT_LE(difference, std::max(relative * grad.norm().item<double>(), of_global * std::sqrt(square))) << name;
  }
}

TEST_P(GoldenCase, ParametersHaveHuggingFacesNamesAndShapes) {
  std::size_t recorded = 0;
  for (const auto& [key, value] : golden_.tensors) recorded += key.starts_with("weights.") ? 1 : 0;
  const auto parameters = all_parameters(*golden_.model);
  EXPECT_EQ(parameters.size(), recorded);
  for (const Parameter* parameter : parameters)
    EXPECT_EQ(golden_.tensors.at("weights." + parameter->name).sizes().vec(), parameter->shape) << parameter->name;
}

TEST_P(GoldenCase, LogitsAndLossEqualTransformers) {
  at::NoGradGuard no_grad;
  const ModelOutput output = forward(golden_.batch, {.want_logits = true});
  const at::Tensor& expected = golden_.tensors.at("logits");
  ASSERT_EQ(output.logits.sizes(), expected.sizes());
  EXPECT_EQ(output.logits.scalar_type(), at::kFloat);
  EXPECT_LE(max_difference(output.logits, expected), 1e-5 * std::max(1.0, expected.abs().max().item<double>()));
  const double loss = golden_.tensors.at("loss").item<double>();
  EXPECT_NEAR(output.loss_sum.item<double>(), loss, 2e-6 * std::abs(loss));
}

TEST_P(GoldenCase, GradientsEqualTransformers) {
  forward(golden_.batch, {.loss_scale = 1.0 / labelled(golden_.batch)}).loss_sum.backward();
  std::map<std::string, at::Tensor> expected;
  for (const auto& [key, value] : golden_.tensors)
    if (key.starts_with("grads.")) expected[key.substr(6)] = value;
  expect_close_gradients(gradients(), expected, 1e-4, 1e-6);
}

TEST_P(GoldenCase, AdamWStepsFollowTransformers) {
  std::map<std::string, std::pair<at::Tensor, at::Tensor>> moments;
  for (const Parameter* p : all_parameters(*golden_.model))
    moments[p->name] = {at::zeros({p->numel()}), at::zeros({p->numel()})};
  const at::Tensor& losses = golden_.tensors.at("step_losses");
  const double scale = 1.0 / labelled(golden_.batch);
  for (std::int64_t step = 0; step < losses.numel(); ++step) {
    clear_gradients();
    const ModelOutput output = forward(golden_.batch, {.loss_scale = scale});
    EXPECT_NEAR(output.loss_sum.item<double>(), losses[step].item<double>(), 2e-5) << "step " << step;
    output.loss_sum.backward();
    for (Parameter* p : all_parameters(*golden_.model)) {
      const bool decays = !p->is_norm && !p->name.ends_with("bias");
      adamw_step({.param = p->value.variable_data().view(-1),
                  .exp_avg = moments[p->name].first,
                  .exp_avg_sq = moments[p->name].second,
                  .grad = p->value.grad().contiguous().view(-1)},
                 {.lr = 1e-3, .weight_decay = decays ? 0.01 : 0.0, .step = step + 1});
    }
  }
  EXPECT_LT(losses[-1].item<double>(), losses[0].item<double>());
}

TEST_P(GoldenCase, PackedRunEqualsRunsExampleByExample) {
  const ModelOutput packed = forward(golden_.batch, {.want_logits = true, .loss_scale = 0.25});
  packed.loss_sum.backward();
  const auto packed_gradients = gradients();
  clear_gradients();
  std::vector<at::Tensor> logits;
  double loss = 0;
  for (std::int64_t s = 0; s < golden_.batch.num_segments(); ++s) {
    const ModelOutput one = forward(cut_batch(golden_.batch, s, s + 1), {.want_logits = true, .loss_scale = 0.25});
    logits.push_back(one.logits);
    loss += one.loss_sum.item<double>();
    one.loss_sum.backward();
  }
  EXPECT_LE(max_difference(packed.logits, at::cat(logits)), 2e-6);
  EXPECT_NEAR(packed.loss_sum.item<double>(), loss, 1e-5);
  expect_close_gradients(packed_gradients, gradients(), 2e-6, 1e-6);
}

TEST_P(GoldenCase, LayersArePureFunctionsWithDropoutToo) {
  const ForwardContext context{.is_training = true, .seed = 5, .step = 3, .micro_batch = 1};
  const double first = forward(golden_.batch, {}, context).loss_sum.item<double>();
  TwiceRunner twice;
  const ForwardOptions options{.label_smoothing = golden_.label_smoothing};
  EXPECT_EQ(golden_.model->forward(golden_.batch, twice, context, options).loss_sum.item<double>(), first);
  if (!golden_.config.contains("hidden_dropout_prob")) return;
  ForwardContext other = context;
  other.micro_batch = 2;
  EXPECT_NE(forward(golden_.batch, {}, other).loss_sum.item<double>(), first);
  other.is_training = false;
  EXPECT_NEAR(forward(golden_.batch, {}, other).loss_sum.item<double>(), golden_.tensors.at("loss").item<double>(),
              1e-5);
}

TEST_P(GoldenCase, Bfloat16StaysNearFp32) {
  for (Parameter* parameter : all_parameters(*golden_.model))
    parameter->value = parameter->value.detach().to(at::kBFloat16).requires_grad_(true);
  const ModelOutput output = forward(golden_.batch, {.want_logits = true, .loss_scale = 1.0 / labelled(golden_.batch)});
  const at::Tensor& expected = golden_.tensors.at("logits");
  EXPECT_EQ(output.logits.scalar_type(), at::kFloat);
  EXPECT_EQ(output.loss_sum.scalar_type(), at::kFloat);
  // A few layers of values rounded to 8 bits: 2^-8 per rounding, accumulated as a random walk.
  EXPECT_LE((output.logits - expected).norm().item<double>(), 0.02 * expected.norm().item<double>());
  output.loss_sum.backward();
  double error = 0, square = 0;
  for (Parameter* parameter : all_parameters(*golden_.model)) {
    const at::Tensor& grad = golden_.tensors.at("grads." + parameter->name);
    error += (parameter->value.grad().to(at::kFloat) - grad).square().sum().item<double>();
    square += grad.square().sum().item<double>();
  }
  EXPECT_LE(std::sqrt(error), 0.03 * std::sqrt(square));
}

INSTANTIATE_TEST_SUITE_P(Transformers, GoldenCase,
                         ::testing::Values("bert", "bert_tanh_gelu", "bert_smoothed", "gpt2", "gpt2_untied",
                                           "gpt2_smoothed", "llama_tied", "llama_untied", "llama_rope3",
                                           "mistral", "qwen2"),
                         [](const auto& instance) { return std::string(instance.param); });

}  // namespace
}  // namespace shardtune::testing
