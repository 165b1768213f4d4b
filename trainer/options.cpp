#include "trainer/options.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>
#include <string_view>

#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/error.hpp"
#include "distributed/parallel/sharding_plan.hpp"
#include "trainer/optimizer.hpp"
#include "trainer/schedule.hpp"

namespace shardtune {
namespace {

constexpr const char* kOfAdamW[] = {"adam_beta1", "adam_beta2", "adam_epsilon"};

[[noreturn]] void refuse(const char* name, const std::string& value, const std::string& advice) {
  fail(ErrorKind::config, fmt::format("--{} = {}: {}", name, value, advice));
}

template <class T>
void need(bool is_met, const char* name, const T& value, const char* advice) {
  if (!is_met) refuse(name, fmt::format("{}", value), advice);
}

void need_one_of(const char* name, const std::string& value, std::initializer_list<std::string> allowed) {
  if (std::find(allowed.begin(), allowed.end(), value) == allowed.end())
    refuse(name, value, fmt::format("use {}", fmt::join(allowed, ", ")));
}

void check_model(const ModelOptions& model, const std::string& command) {
  need_one_of("task", model.task, {"text-classification", "causal-lm"});
  for (const auto& [name, value] : model.dropout) need(value >= 0 && value < 1, name.c_str(), value, "a probability from 0 to below 1 is needed");
  if (!model.model_name_or_path.empty() && !model.config_name.empty())
    fail(ErrorKind::config, "--model_name_or_path and --config_name exclude each other: the first brings weights, the second starts from random ones");
  if (model.model_name_or_path.empty() && model.config_name.empty())
    fail(ErrorKind::config, command == "train" ? "--model_name_or_path is missing: a directory in Hugging Face layout (or --config_name for random weights)"
                                               : "--model_name_or_path is missing: a model directory, a checkpoint or an output directory");
}

void check_parallel(const TrainOptions& train) {
  // Before anything computes with them: larger values would not survive it.
  need(train.hsdp_shard_size >= 0 && train.hsdp_shard_size <= 1000000, "hsdp_shard_size", train.hsdp_shard_size,
       "0 (= the ranks of a node) to 1000000 ranks are needed");
  const ShardingPlan plan = resolve_sharding_plan(plan_request(train));
  if (train.share_frozen_weights && plan.reshard_after_backward)
    refuse("share_frozen_weights", "true",
           fmt::format("{} never keeps weights whole, a node has them once anyway; leave the option out, or use ddp, "
                       "zero1 or zero2",
                       plan.name));
  if (train.bf16 && train.fp16) fail(ErrorKind::config, "--bf16 and --fp16 exclude each other; bf16 needs no loss scale");
  need_one_of("reduce_dtype", train.reduce_dtype, {"fp32", "bf16"});
  need(train.ddp_bucket_cap_mb >= 0 && train.ddp_bucket_cap_mb <= 4096, "ddp_bucket_cap_mb", train.ddp_bucket_cap_mb, "0 (= measured) or 1 to 4096 MiB are needed");
  need_one_of("adam_state_dtype", train.adam_state_dtype, {"fp32", "bf16"});
  need_one_of("gradient_checkpointing_mode", train.gradient_checkpointing_mode, {"full", "selective"});
  need(train.gradient_checkpointing_every >= 1, "gradient_checkpointing_every", train.gradient_checkpointing_every, "at least 1 is needed");
  need(train.activation_memory_budget >= 0 && train.activation_memory_budget <= 1 << 30, "activation_memory_budget",
       train.activation_memory_budget, "0 (= off) or a number of MiB up to 1073741824 is needed");
  const bool is_tuned = train.gradient_checkpointing_every != 1 || train.gradient_checkpointing_mode != "full";
  if (is_tuned && !train.gradient_checkpointing)
    fail(ErrorKind::config, "--gradient_checkpointing_every and --gradient_checkpointing_mode need --gradient_checkpointing");
  if (train.activation_memory_budget > 0 && train.gradient_checkpointing)
    fail(ErrorKind::config, "--activation_memory_budget chooses per layer what to recompute; leave --gradient_checkpointing out");
}

// The upper limits are beyond any use and keep products of these numbers inside 64 bits.
void check_sizes(const TrainOptions& train) {
  constexpr std::int64_t kMost = 1'000'000;
  need(train.per_device_train_batch_size > 0 && train.per_device_train_batch_size <= kMost, "per_device_train_batch_size",
       train.per_device_train_batch_size, "1 to 1000000 is needed");
  need(train.gradient_accumulation_steps > 0 && train.gradient_accumulation_steps <= kMost, "gradient_accumulation_steps",
       train.gradient_accumulation_steps, "1 to 1000000 is needed");
  need(train.global_batch_size >= 0 && train.global_batch_size <= kMost * kMost, "global_batch_size", train.global_batch_size,
       "0 (= computed) to 1000000000000 is needed");
  need(train.max_tokens_per_batch >= 0, "max_tokens_per_batch", train.max_tokens_per_batch, "0 (= no limit) or more is needed");
  need(train.max_steps == -1 || train.max_steps > 0, "max_steps", train.max_steps, "-1 (= by epochs) or at least 1 is needed");
  need(train.num_train_epochs > 0 && train.num_train_epochs <= 1e6, "num_train_epochs", train.num_train_epochs,
       "more than 0 and at most 1000000 is needed (--max_steps counts steps instead)");
  need(train.save_total_limit >= 0 && train.save_total_limit <= kMost, "save_total_limit", train.save_total_limit,
       "0 (= keep all) to 1000000 is needed");
  need(train.checkpoint_staging_mb > 0 && train.checkpoint_staging_mb <= 1 << 30, "checkpoint_staging_mb", train.checkpoint_staging_mb,
       "1 to 1073741824 MiB are needed (--no_async_save saves without copies)");
  need(train.ranks_per_file >= 0 && train.ranks_per_file < 100000, "ranks_per_file", train.ranks_per_file, "0 (= chosen) or more is needed");
  need_one_of("on_save_error", train.on_save_error, {"continue", "stop"});
  need_one_of("checkpoint_compression", train.checkpoint_compression, {"none", "zstd"});
  need_one_of("on_save_overlap", train.on_save_overlap, {"wait", "skip"});
  need(train.seed >= 0, "seed", train.seed, "0 or more is needed");
  need(train.data_seed.value_or(0) >= 0, "data_seed", train.data_seed.value_or(0), "0 or more is needed");
}

void check_optimizer(const RunOptions& options) {
  const TrainOptions& train = options.train;
  const OptimizerSettings settings = optimizer_settings(train);  // refuses what does not fit together
  for (const char* name : kOfAdamW)
    if (settings.name == "sgd" && is_explicitly_set(options, name))
      fail(ErrorKind::config, fmt::format("--{} is AdamW's, --optim is sgd; leave one of them out", name));
  need(std::isfinite(train.learning_rate) && train.learning_rate >= 0, "learning_rate", train.learning_rate, "0 or more is needed");
  need(std::isfinite(train.weight_decay) && train.weight_decay >= 0, "weight_decay", train.weight_decay, "0 or more is needed");
  need(train.adam_beta1 >= 0 && train.adam_beta1 < 1, "adam_beta1", train.adam_beta1, "0 to below 1 is needed");
  need(train.adam_beta2 >= 0 && train.adam_beta2 < 1, "adam_beta2", train.adam_beta2, "0 to below 1 is needed");
  need(train.adam_epsilon > 0, "adam_epsilon", train.adam_epsilon, "more than 0 is needed");
  need(std::isfinite(train.max_grad_norm) && train.max_grad_norm >= 0, "max_grad_norm", train.max_grad_norm, "0 (= no clipping) or more is needed");
  need(train.warmup_steps >= 0 && train.warmup_steps <= 1e15, "warmup_steps", train.warmup_steps, "0 to 1e15 is needed");
  need(train.warmup_ratio >= 0 && train.warmup_ratio <= 1, "warmup_ratio", train.warmup_ratio, "a share from 0 to 1 is needed");
  const LearningRateSchedule schedule(train.lr_scheduler_type, train.learning_rate, 0, 1);  // refuses an unknown name
  need_one_of("reduction", train.reduction, {"tree", "fast"});
  need_one_of("loss_normalization", train.loss_normalization, {"global"});
  need_one_of("train_sampling_strategy", train.train_sampling_strategy, {"random", "sequential"});
}

void check_intervals(const TrainOptions& train, bool has_validation_file) {
  const auto check = [](const char* name, Interval strategy, double steps) {
    if (strategy != Interval::steps) return;
    need(steps > 0 && steps <= 1e15 && (steps < 1 || steps == std::floor(steps)), name, steps, "a whole number of steps, or a share below 1, is needed");
  };
  need(train.eval_steps >= 0, "eval_steps", train.eval_steps, "0 (= logging_steps) or more is needed");
  check("logging_steps", train.logging_strategy, train.logging_steps);
  check("eval_steps", train.eval_strategy, effective_eval_steps(train));
  check("save_steps", train.save_strategy, train.save_steps);
  if ((train.eval_strategy != Interval::no || train.eval_on_start) && !has_validation_file)
    fail(ErrorKind::config, fmt::format("--{} asks for evaluations but there is no --validation_file",
                                        train.eval_on_start ? "eval_on_start" : "eval_strategy"));
  if (!train.load_best_model_at_end) return;
  if (train.eval_strategy == Interval::no || train.save_strategy == Interval::no)
    fail(ErrorKind::config, "--load_best_model_at_end needs an --eval_strategy and a --save_strategy (steps or epoch): the best model is found by "
                            "evaluating and kept as a checkpoint");
}

// Whether another option leaves this one without a meaning, so that naming both is refused.
bool is_superseded(const RunOptions& options, const std::string& name) {
  const TrainOptions& train = options.train;
  if (name == "sharding") return !train.fsdp.empty();
  return std::find(std::begin(kOfAdamW), std::end(kOfAdamW), name) != std::end(kOfAdamW) && optimizer_settings(train).name == "sgd";
}

// As launcher/config_file.cpp reads it back; it knows no escapes, so a value with both kinds of quotes may stay cut.
std::string quoted_if_needed(const std::string& value) {
  if (value.empty()) return value;
  const std::string_view blank = " \t\r", quotes = "\"'";
  const bool is_plain = blank.find(value.front()) == blank.npos && blank.find(value.back()) == blank.npos &&
                        quotes.find(value.front()) == quotes.npos && value.front() != '#' && value.find(" #") == value.npos &&
                        value.find("\t#") == value.npos;
  if (is_plain) return value;
  const char quote = value.find('"') == value.npos ? '"' : '\'';
  return quote + value + quote;
}

}  // namespace

PlanRequest plan_request(const TrainOptions& train) {
  PlanRequest request{.name = train.sharding, .reshard_after_forward = train.reshard_after_forward};
  if (!train.fsdp.empty()) {
    request = plan_from_fsdp(train.fsdp);
    if (train.reshard_after_forward) request.reshard_after_forward = train.reshard_after_forward;
  }
  request.hsdp_shard_size = static_cast<int>(train.hsdp_shard_size);
  return request;
}

double effective_eval_steps(const TrainOptions& train) {
  return train.eval_steps > 0 ? train.eval_steps : train.logging_steps;
}

std::string resolved_text(const RunOptions& options) {
  std::string text;
  for (const auto& [name, value] : options.resolved)
    if ((!value.empty() || is_explicitly_set(options, name)) && !is_superseded(options, name))
      text += fmt::format("{} = {}\n", name, quoted_if_needed(value));
  return text;
}

bool is_explicitly_set(const RunOptions& options, const std::string& name) {
  return std::find(options.explicitly_set.begin(), options.explicitly_set.end(), name) != options.explicitly_set.end();
}

void validate(const RunOptions& options, const std::string& command) {
  const TrainOptions& train = options.train;
  check_model(options.model, command);
  check_parallel(train);
  if (const std::string plan = plan_request(train).name; is_explicitly_set(options, "sharding") && plan != train.sharding)
    fail(ErrorKind::config, fmt::format("--fsdp = {} is {} but --sharding is {}; give one of them", train.fsdp, plan, train.sharding));
  need(train.per_device_eval_batch_size > 0, "per_device_eval_batch_size", train.per_device_eval_batch_size, "at least 1 is needed");
  need(train.num_threads >= 0 && train.num_threads <= kMostThreads, "num_threads", train.num_threads,
       fmt::format("0 (= automatic) to {} is needed", kMostThreads).c_str());
  need(options.data.max_seq_length >= 0, "max_seq_length", options.data.max_seq_length, "0 (= what the model allows) or more is needed");
  need(options.data.max_train_samples >= 0, "max_train_samples", options.data.max_train_samples, "0 (= all) or more is needed");
  need(options.data.max_eval_samples >= 0, "max_eval_samples", options.data.max_eval_samples, "0 (= all) or more is needed");
  need(train.label_smoothing_factor >= 0 && train.label_smoothing_factor < 1, "label_smoothing_factor",
       train.label_smoothing_factor, "a share from 0 (= no smoothing) to below 1 is needed; 0.1 is common");
  need_one_of("log_level", train.log_level, {"debug", "info", "warn", "error"});
  if (command != "train") return;
  if (options.data.train_file.empty()) fail(ErrorKind::config, "--train_file is missing: the rows to train on");
  if (train.output_dir.empty()) fail(ErrorKind::config, "--output_dir is missing: where checkpoints and the trained model go");
  check_sizes(train);
  check_optimizer(options);
  check_intervals(train, !options.data.validation_file.empty());
}

}  // namespace shardtune
