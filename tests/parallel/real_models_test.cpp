// Real architectures through the engine: BERT with dropout, Llama with a tied head, against the plain run of the same
// weights, bit for bit.
#include <functional>
#include <mutex>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <gtest/gtest.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include <nlohmann/json.hpp>

#include "core/rng.hpp"
#include "distributed/comm/thread_group.hpp"
#include "models/model.hpp"
#include "tests/parallel/toy_run.hpp"

namespace shardtune {
namespace {

using toy::Tensors;

constexpr std::int64_t kMicroBatches = 3;
constexpr std::uint64_t kSeed = 11;

struct Architecture {
  const char* name;
  const char* config;
  Task task;
};

constexpr Architecture kBert{"Bert", R"({"architectures": ["BertForSequenceClassification"], "model_type": "bert",
  "vocab_size": 211, "hidden_size": 36, "num_hidden_layers": 3, "num_attention_heads": 3, "intermediate_size": 100,
  "hidden_act": "gelu", "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "max_position_embeddings": 64,
  "type_vocab_size": 2, "initializer_range": 0.2, "layer_norm_eps": 1e-12, "pad_token_id": 0})",
                             Task::text_classification};
constexpr Architecture kLlama{"Llama", R"({"architectures": ["LlamaForCausalLM"], "model_type": "llama",
  "vocab_size": 211, "hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
  "intermediate_size": 100, "hidden_act": "silu", "max_position_embeddings": 64, "initializer_range": 0.2,
  "rms_norm_eps": 1e-6, "tie_word_embeddings": true})",
                              Task::causal_lm};

std::unique_ptr<Model> make(const Architecture& architecture) {
  nlohmann::json config = nlohmann::json::parse(architecture.config);
  ModelRequest request{.config = &config, .origin = "test", .task = architecture.task, .labels = {}, .dropout = {}};
  if (architecture.task == Task::text_classification) request.labels = {"a", "b", "c"};
  return make_model(request);
}

Batch make_batch(const Architecture& architecture, std::int64_t micro_batch) {
  PhiloxStream random(mix_key(3, static_cast<std::uint64_t>(micro_batch)));
  Batch batch;
  batch.segment_offsets = {0};
  std::vector<std::int64_t> ids, positions, labels;
  const bool is_lm = architecture.task == Task::causal_lm;
  for (std::int64_t segment = 0; segment < 2 + micro_batch; ++segment) {
    const auto length = static_cast<std::int64_t>(3 + random.next_below(9));
    for (std::int64_t t = 0; t < length; ++t) {
      ids.push_back(static_cast<std::int64_t>(1 + random.next_below(210)));
      positions.push_back(t);
      if (is_lm) labels.push_back(t + 1 < length ? static_cast<std::int64_t>(random.next_below(211)) : -100);
    }
    if (!is_lm) labels.push_back(static_cast<std::int64_t>(random.next_below(3)));
    batch.segment_offsets.push_back(static_cast<std::int64_t>(ids.size()));
    batch.example_index.push_back(segment);
  }
  batch.ids = at::tensor(ids, at::kLong);
  batch.positions = at::tensor(positions, at::kLong);
  batch.token_types = at::zeros_like(batch.ids);
  batch.labels = at::tensor(labels, at::kLong);
  return batch;
}

at::Tensor loss_of(Model& model, const Architecture& architecture, UnitRunner& runner, std::int64_t micro_batch) {
  const ForwardContext context{.is_training = true, .seed = kSeed, .step = 2, .micro_batch = micro_batch};
  return model.forward(make_batch(architecture, micro_batch), runner, context, {.loss_scale = 0.05}).loss_sum;
}

Tensors plain_gradients(const Architecture& architecture, at::ScalarType dtype) {
  const std::unique_ptr<Model> model = make(architecture);
  for (Unit* unit : model->units()) {
    for (Parameter* p : unit->parameters) {
      at::Tensor weight = at::empty({p->numel()}, at::kFloat);
      initialize_slice(*p, kSeed, 0, weight);
      p->value = weight.view(p->shape).to(dtype, /*non_blocking=*/false, /*copy=*/true).set_requires_grad(true);
      p->value.set_grad_dtype(at::kFloat);
    }
  }
  PlainRunner runner;
  Tensors sum;
  for (std::int64_t i = 0; i < kMicroBatches; ++i) {  // (0 + 1) + 2 is the tree of three leaves
    torch::autograd::backward({loss_of(*model, architecture, runner, i)}, {});
    for (Unit* unit : model->units()) {
      for (Parameter* p : unit->parameters) {
        const at::Tensor gradient = p->value.grad().clone();
        sum[p->name] = i == 0 ? gradient : sum[p->name] + gradient;
        p->value.mutable_grad().reset();
      }
    }
  }
  return sum;
}

void compare_on_rank(const Architecture& architecture, const toy::ToyRun& run, Communicator& world,
                     const Tensors& wanted) {
  at::set_num_threads(1);
  const std::unique_ptr<Model> model = make(architecture);
  ParallelEngine engine(model->units(), world, toy::parallel_options(run, world.size()));
  for (ShardedParameter* p : engine.parameters()) {
    initialize_slice(*p->parameter, kSeed, p->slice_offset(), p->slice_of(p->master));
  }
  engine.weights_loaded();
  engine.begin_step(kMicroBatches);
  for (std::int64_t round = 0; round < engine.num_rounds(kMicroBatches); ++round) {
    const std::int64_t index = engine.micro_batch_of_round(kMicroBatches, round);
    if (index < 0 && !engine.runs_every_round()) continue;
    engine.begin_micro_batch(round);
    engine.backward(loss_of(*model, architecture, engine.runner(), std::max<std::int64_t>(index, 0)));
  }
  engine.finish_step();
  ASSERT_EQ(engine.trainable().size(), wanted.size());
  for (const ShardedParameter* p : engine.trainable()) {
    const at::Tensor whole = wanted.at(p->parameter->name).reshape({-1});
    EXPECT_TRUE(at::equal(p->gradient, whole.narrow(0, p->master_offset, p->gradient.numel())))
        << architecture.name << " " << p->parameter->name << " " << run.describe() << ", difference "
        << (p->gradient - whole.narrow(0, p->master_offset, p->gradient.numel())).abs().max().item<float>();
  }
}

class RealModels : public testing::TestWithParam<std::pair<Architecture, at::ScalarType>> {};

TEST_P(RealModels, GradientsHaveTheBitsOfThePlainRun) {
  at::set_num_threads(1);
  const auto& [architecture, dtype] = GetParam();
  const Tensors wanted = plain_gradients(architecture, dtype);
  double magnitude = 0.0;
  for (const auto& [name, gradient] : wanted) magnitude += gradient.abs().sum().item<double>();
  ASSERT_GT(magnitude, 0.1);
  for (const std::string& plan : toy::all_plans()) {
    for (const RecomputeMode mode : {RecomputeMode::none, RecomputeMode::full, RecomputeMode::selective}) {
      for (const int ranks : {1, 4}) {
        const toy::ToyRun run{.plan = plan,
                              .dtype = dtype,
                              .recompute = {.mode = mode},
                              .num_ranks = ranks,
                              .num_micro_batches = kMicroBatches};
        run_thread_ranks(ranks, [&](Communicator& world) { compare_on_rank(GetParam().first, run, world, wanted); });
      }
    }
  }
}

std::string name_of(const testing::TestParamInfo<RealModels::ParamType>& info) {
  return std::string(info.param.first.name) + at::toString(info.param.second);
}

INSTANTIATE_TEST_SUITE_P(Architectures, RealModels,
                         testing::Values(std::pair{kBert, at::kFloat}, std::pair{kBert, at::kBFloat16},
                                         std::pair{kBert, at::kHalf}, std::pair{kLlama, at::kHalf},
                                         std::pair{kLlama, at::kFloat}, std::pair{kLlama, at::kBFloat16}),
                         name_of);

}  // namespace
}  // namespace shardtune
