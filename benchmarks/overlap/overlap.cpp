// See README.md in this folder.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <string>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <nlohmann/json.hpp>

#include "benchmarks/overlap/delaying_communicator.hpp"
#include "core/log.hpp"
#include "distributed/comm/thread_group.hpp"
#include "distributed/parallel/parallel_engine.hpp"
#include "models/model.hpp"

namespace shardtune::benchmark {
namespace {

// Of a plan: weights are gathered by messages, as between machines, not written into memory in common.
constexpr std::string_view kGathered = "-gathered";

struct Settings {
  std::vector<std::string> plans;
  double share = 0.5;
  int num_layers = 24;
  int num_tokens = 256;
  int num_rounds = 15;
  int num_ranks = 2;
};

struct Result {
  double plain_seconds = 0.0;
  double delayed_seconds = 0.0;
  double injected_seconds = 0.0;
  double exposed = 0.0;  // of what is injected
  double num_bytes = 0.0;
};

double median(std::vector<double> values) {
  std::nth_element(values.begin(), values.begin() + static_cast<std::ptrdiff_t>(values.size() / 2), values.end());
  return values[values.size() / 2];
}

std::unique_ptr<Model> make_llama_like(int num_layers) {
  nlohmann::json config = {{"architectures", {"LlamaForCausalLM"}},
                           {"model_type", "llama"},
                           {"vocab_size", 1000},
                           {"hidden_size", 256},
                           {"num_hidden_layers", num_layers},
                           {"num_attention_heads", 4},
                           {"num_key_value_heads", 4},
                           {"intermediate_size", 704},
                           {"hidden_act", "silu"},
                           {"max_position_embeddings", 4096},
                           {"initializer_range", 0.02},
                           {"rms_norm_eps", 1e-6},
                           {"tie_word_embeddings", true}};
  return make_model({.config = &config, .origin = "benchmark", .task = Task::causal_lm, .labels = {}, .dropout = {}});
}

Batch make_batch(int num_tokens) {
  Batch batch;
  batch.segment_offsets = {0, num_tokens};
  batch.example_index = {0};
  batch.ids = at::arange(num_tokens, at::kLong) % 997;
  batch.positions = at::arange(num_tokens, at::kLong);
  batch.labels = (at::arange(num_tokens, at::kLong) * 31) % 991;
  return batch;
}

// Everything of a step that communicates; the optimizer is left out, its time is not what is asked for.
double step_seconds(ParallelEngine& engine, Model& model, const Batch& batch, Communicator& world) {
  world.barrier();
  const auto start = std::chrono::steady_clock::now();
  const std::int64_t v = world.size();
  engine.begin_step(v);
  engine.begin_micro_batch(0);
  engine.backward(model.forward(batch, engine.runner(), {.is_training = true}, {.loss_scale = 1e-3}).loss_sum);
  engine.finish_step();
  engine.after_optimizer_step();
  world.barrier();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

void measure_on_rank(const Settings& settings, const std::string& plan, Communicator& inner, Result& result) {
  at::set_num_threads(1);
  Delay delay;
  const bool is_gathered = plan.ends_with(kGathered);
  const std::string plan_name = is_gathered ? plan.substr(0, plan.size() - kGathered.size()) : plan;
  const std::unique_ptr<Communicator> world = make_delaying_communicator(inner, delay, !is_gathered);
  const std::unique_ptr<Model> model = make_llama_like(settings.num_layers);
  ParallelEngine engine(model->units(), *world, {.plan = find_sharding_plan(plan_name), .hsdp_shard_size = 1});
  for (ShardedParameter* p : engine.parameters())
    initialize_slice(*p->parameter, 1, p->slice_offset(), p->slice_of(p->master));
  engine.weights_loaded();
  const Batch batch = make_batch(settings.num_tokens);
  for (int i = 0; i < 3; ++i) step_seconds(engine, *model, batch, *world);  // the first steps make buffers
  delay.num_bytes = 0;
  step_seconds(engine, *model, batch, *world);
  const auto num_bytes = static_cast<double>(delay.num_bytes);
  std::vector<double> plain, delayed, injected, exposed;
  for (int i = 0; i < settings.num_rounds; ++i) {
    plain.push_back(step_seconds(engine, *model, batch, *world));
    // Rank 0 decides for all: the rate at which a step's bytes take the wanted share of the step just measured.
    at::Tensor rate = at::full({1}, num_bytes / (settings.share * plain.back()), at::kDouble);
    world->broadcast(rate, 0).wait();
    delay.injected_ns = 0;
    delay.bytes_per_second = rate.item<double>();
    delayed.push_back(step_seconds(engine, *model, batch, *world));
    delay.bytes_per_second = 0.0;
    injected.push_back(1e-9 * static_cast<double>(delay.injected_ns));
    exposed.push_back((delayed.back() - plain.back()) / injected.back());
  }
  if (world->rank() != 0) return;
  result = {.plain_seconds = median(plain),
            .delayed_seconds = median(delayed),
            .injected_seconds = median(injected),
            .exposed = median(exposed),
            .num_bytes = num_bytes};
}

Settings parse(int argc, char** argv) {
  Settings settings;
  for (int i = 1; i < argc; ++i) {
    const std::string_view word = argv[i];
    const bool has_value = i + 1 < argc;
    if (word == "--share" && has_value)
      settings.share = std::atof(argv[++i]);
    else if (word == "--layers" && has_value)
      settings.num_layers = std::atoi(argv[++i]);
    else if (word == "--tokens" && has_value)
      settings.num_tokens = std::atoi(argv[++i]);
    else if (word == "--ranks" && has_value)
      settings.num_ranks = std::atoi(argv[++i]);
    else
      settings.plans.emplace_back(word);
  }
  if (settings.plans.empty()) settings.plans = {"ddp", "zero1", "zero2", "zero3", "zero3-gathered"};
  return settings;
}

}  // namespace
}  // namespace shardtune::benchmark

int main(int argc, char** argv) {
  using namespace shardtune::benchmark;
  const Settings settings = parse(argc, argv);
  std::printf("%-15s %10s %12s %12s %12s %12s\n", "plan", "MiB/step", "plain ms", "injected ms", "delayed ms",
              "exposed %");
  for (const std::string& plan : settings.plans) {
    Result result;
    shardtune::run_thread_ranks(
        settings.num_ranks, [&](shardtune::Communicator& world) { measure_on_rank(settings, plan, world, result); });
    std::printf("%-15s %10.1f %12.1f %12.1f %12.1f %12.1f\n", plan.c_str(), result.num_bytes / 1048576.0,
                1e3 * result.plain_seconds, 1e3 * result.injected_seconds, 1e3 * result.delayed_seconds,
                100.0 * result.exposed);
  }
  return 0;
}
