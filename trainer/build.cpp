#include "trainer/build.hpp"

#include <fnmatch.h>

#include <algorithm>
#include <cmath>
#include <cstdlib>

#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "core/host.hpp"
#include "core/log.hpp"
#include "distributed/comm/exchange.hpp"
#include "distributed/parallel/bucket_size.hpp"
#include "distributed/parallel/sharding_plan.hpp"
#include "kernels/instruction_set.hpp"
#include "trainer/checkpointing.hpp"
#include "trainer/precision_check.hpp"
#include "trainer/schedule.hpp"
#include "trainer/weights.hpp"

namespace shardtune {

void check_same_options(const RunOptions& options, Communicator& world) {
  nlohmann::json own = options.resolved;
  const std::vector<std::string> all = all_gather_strings(world, own.dump());
  const nlohmann::json reference = nlohmann::json::parse(all.front());
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    if (all[rank] == all.front()) continue;
    const nlohmann::json other = nlohmann::json::parse(all[rank]);
    for (std::size_t i = 0; i < std::min(reference.size(), other.size()); ++i) {
      if (reference[i] == other[i]) continue;
      fail(ErrorKind::config, fmt::format("ranks were started with different configurations: --{} is '{}' on rank 0 and '{}' on "
                                          "rank {}; give all ranks the same options and configuration file",
                                          reference[i][0].get<std::string>(), reference[i][1].get<std::string>(),
                                          other[i][1].get<std::string>(), rank));
    }
    fail(ErrorKind::config, fmt::format("rank {} runs another version of shardtune than rank 0", rank));
  }
}

DatasetOptions dataset_options(const RunOptions& options, const std::string& file, std::int64_t max_length) {
  DatasetOptions result;
  result.file = file;
  result.text_column = options.data.text_column;
  result.text_pair_column = options.data.text_pair_column;
  result.label_column = options.data.label_column;
  result.column_names = options.data.column_names;
  result.max_length = max_length;
  return result;
}

std::unique_ptr<Dataset> build_dataset(const DatasetOptions& options, const std::string& task,
                                       const std::vector<std::string>& labels, const Tokenizer& tokenizer) {
  if (task == "causal-lm") return make_causal_lm_dataset(options, tokenizer);
  return make_classification_dataset(options, labels, tokenizer);
}

ParallelOptions parallel_options(const TrainOptions& train, Communicator& world) {
  const PlanRequest request = plan_request(train);
  ParallelOptions options{.plan = resolve_sharding_plan(request),
                          .hsdp_shard_size = request.hsdp_shard_size,
                          .compute_dtype = train.bf16 ? at::kBFloat16 : train.fp16 ? at::kHalf : at::kFloat,
                          .reduction = train.reduction == "fast" ? ReductionOrder::fast : ReductionOrder::tree,
                          .reduce_dtype = train.reduce_dtype == "bf16" ? at::kBFloat16 : at::kFloat,
                          .recompute = {.every = train.gradient_checkpointing_every,
                                        .budget_bytes = train.activation_memory_budget << 20}};
  if (train.share_frozen_weights) options.share_frozen_on_host = host_name();
  if (train.gradient_checkpointing) {
    const bool is_selective = train.gradient_checkpointing_mode == "selective";
    options.recompute.mode = is_selective ? RecomputeMode::selective : RecomputeMode::full;
  }
  if (options.plan.shard_axis == MeshAxis::node && options.hsdp_shard_size == 0)
    options.hsdp_shard_size = ranks_per_node(world, host_name());
  return options;
}

void choose_bucket_size(const TrainOptions& train, Communicator& world, ParallelOptions& parallel) {
  if (world.size() == 1) return;
  if (train.ddp_bucket_cap_mb > 0) {
    parallel.bucket_bytes = train.ddp_bucket_cap_mb << 20;
    log::info("communication buffers of {} MiB (--ddp_bucket_cap_mb)", train.ddp_bucket_cap_mb);
    return;
  }
  const std::vector<std::string> hosts = all_gather_strings(world, host_name());
  const char* transport = std::getenv("SHARDTUNE_COMM");
  const BucketSizeKey key{.host = hosts.front(),
                          .version = SHARDTUNE_VERSION,
                          .num_ranks = world.size(),
                          .ranks_per_node = static_cast<int>(std::count(hosts.begin(), hosts.end(), hosts.front())),
                          .is_all_reduce = parallel.plan.shard_axis == MeshAxis::self,
                          .transport = transport != nullptr && *transport != '\0' ? transport : "auto"};
  const BucketSizeChoice choice = choose_bucket_bytes(world, key, user_cache_directory());
  parallel.bucket_bytes = choice.bytes;
  log::info("communication buffers of {} MiB ({})", choice.bytes >> 20, choice.reason);
}

std::string describe_reduction(const ParallelOptions& options, int num_ranks) {
  if (options.reduction == ReductionOrder::tree) return "tree";
  const std::string shards = options.hsdp_shard_size > 0 ? fmt::format(" of {}", options.hsdp_shard_size) : "";
  return fmt::format("fast, {}{} on {} ranks", options.plan.name, shards, num_ranks);
}

void freeze_parameters(Model& model, const std::vector<std::string>& patterns) {
  for (const std::string& pattern : patterns) {
    bool has_match = false;
    for (Unit* unit : model.units()) {
      for (Parameter* parameter : unit->parameters) {
        if (::fnmatch(pattern.c_str(), parameter->name.c_str(), 0) != 0) continue;
        parameter->is_trainable = false;
        has_match = true;
      }
    }
    if (!has_match)
      fail(ErrorKind::config, fmt::format("--freeze = {}: no parameter has such a name (patterns take * and ?, e.g. "
                                          "'{}')",
                                          pattern, model.units().front()->parameters.front()->name));
  }
}

LoadedModel load_for_inference(const RunOptions& options, Communicator& world) {
  check_precision(options.train);
  LoadedModel loaded;
  loaded.source = find_model_source(options.model);
  loaded.model = build_model(loaded.source, options.model, {});
  // The model's configuration, not the file's: where the file names no classes they are LABEL_0, LABEL_1, ...
  loaded.labels = config_labels(loaded.model->config_json());
  loaded.tokenizer = build_tokenizer(loaded.source);
  loaded.max_length = resolve_max_length(options.data, *loaded.model, loaded.source);
  loaded.engine = std::make_unique<ParallelEngine>(
      loaded.model->units(), world, parallel_options(options.train, world));
  const auto seed = static_cast<std::uint64_t>(options.train.seed);
  if (!loaded.source.checkpoint_dir.empty()) {
    CheckpointStore store(absolute_checkpoint(loaded.source.checkpoint_dir).parent_path(), world);
    load_checkpoint(store, loaded.source.checkpoint_dir, *loaded.engine, nullptr);
  } else if (!loaded.source.weights_dir.empty()) {
    const WeightReport report = load_pretrained(loaded.source.weights_dir, *loaded.model, *loaded.engine, seed);
    if (!report.newly_initialized.empty())
      log::warn("{}: no weights for {}; they are random, so the results mean nothing before training",
                loaded.source.weights_dir.string(), fmt::join(report.newly_initialized, ", "));
  } else {
    initialize_randomly(*loaded.engine, seed);
  }
  log::info("{} ranks of {} threads, kernels for {}", world.size(), at::get_num_threads(), name_of(instruction_set()));
  return loaded;
}

LoaderOptions loader_options(const RunIdentity& identity, const Model& model) {
  return {.global_batch_size = identity.global_batch_size,
          .micro_batch_size = identity.per_device_train_batch_size,
          .max_tokens_per_batch = identity.max_tokens_per_batch,
          .drop_last = identity.dataloader_drop_last,
          .strategy = identity.train_sampling_strategy == "sequential" ? SamplingStrategy::sequential : SamplingStrategy::random,
          .seed = static_cast<std::uint64_t>(identity.data_seed),
          .want_token_types = model.uses_token_types()};
}

TrainerSettings trainer_settings(const RunOptions& options, std::int64_t steps_per_epoch) {
  const TrainOptions& train = options.train;
  TrainerSettings settings;
  settings.steps_per_epoch = steps_per_epoch;
  settings.max_steps = train.max_steps > 0 ? train.max_steps
                                           : static_cast<std::int64_t>(std::ceil(train.num_train_epochs * static_cast<double>(steps_per_epoch)));
  const auto interval = [&](Interval strategy, double steps) -> StepInterval {
    if (strategy == Interval::no) return {};
    if (strategy == Interval::epoch) return {.every = steps_per_epoch, .and_last = true};
    return {.every = resolve_interval(steps, settings.max_steps)};
  };
  settings.logging = interval(train.logging_strategy, train.logging_steps);
  settings.eval = interval(train.eval_strategy, effective_eval_steps(train));
  settings.save = interval(train.save_strategy, train.save_steps);
  settings.save.and_last = train.save_strategy != Interval::no;
  settings.logging_first_step = train.logging_first_step;
  settings.eval_on_start = train.eval_on_start;
  settings.log_memory = train.log_memory;
  settings.max_grad_norm = train.max_grad_norm;
  settings.label_smoothing = train.label_smoothing_factor;
  settings.seed = static_cast<std::uint64_t>(train.seed);
  settings.load_best_model_at_end = train.load_best_model_at_end;
  const std::string metric = train.metric_for_best_model.empty() ? "loss" : train.metric_for_best_model;
  settings.metric_for_best_model = metric.starts_with("eval_") ? metric : "eval_" + metric;
  settings.greater_is_better = train.greater_is_better.value_or(!metric.ends_with("loss"));
  return settings;
}

}  // namespace shardtune
