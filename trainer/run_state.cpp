#include "trainer/run_state.hpp"

#include <algorithm>
#include <cmath>
#include <random>

#include <ATen/Version.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <torch/headeronly/version.h>

#include "core/error.hpp"
#include "core/hash.hpp"
#include "core/json.hpp"
#include "core/log.hpp"
#include "distributed/comm/exchange.hpp"
#include "kernels/instruction_set.hpp"
#include "kernels/matrix_product.hpp"
#include "trainer/optimizer.hpp"

namespace shardtune {
namespace {

template <class T, class Field>
void adopt(const char* name, const T& stored, Field& field, RunOptions& options) {
  if (is_explicitly_set(options, name) && field != stored)
    fail(ErrorKind::config,
         fmt::format("--{} = {} contradicts the run being resumed, which was started with {}; leave the option out, or "
                     "start a new run in another --output_dir",
                     name, T(field), stored));
  field = stored;
  for (auto& [resolved, text] : options.resolved)
    if (resolved == name) text = fmt::format("{}", stored);
}

}  // namespace

nlohmann::json RunIdentity::to_json() const {
  return {{"run_id", run_id},
          {"task", task},
          {"model_hash", model_hash},
          {"labels", labels},
          {"data_hash", data_hash},
          {"global_batch_size", global_batch_size},
          {"per_device_train_batch_size", per_device_train_batch_size},
          {"gradient_accumulation_steps", gradient_accumulation_steps},
          {"max_tokens_per_batch", max_tokens_per_batch},
          {"max_seq_length", max_seq_length},
          {"seed", seed},
          {"data_seed", data_seed},
          {"train_sampling_strategy", train_sampling_strategy},
          {"dataloader_drop_last", dataloader_drop_last},
          {"optimizer", optimizer},
          {"label_smoothing_factor", label_smoothing_factor}};
}

RunIdentity RunIdentity::from_json(const nlohmann::json& json, const std::string& origin) {
  RunIdentity id;
  const auto integer = [&](const char* key) { return json_get<std::int64_t>(json, key, origin); };
  const auto text = [&](const char* key) { return json_get<std::string>(json, key, origin); };
  id.run_id = text("run_id");
  id.task = text("task");
  id.model_hash = text("model_hash");
  id.data_hash = text("data_hash");
  for (const auto& label : json.at("labels")) id.labels.push_back(label.get<std::string>());
  id.global_batch_size = integer("global_batch_size");
  id.per_device_train_batch_size = integer("per_device_train_batch_size");
  id.gradient_accumulation_steps = integer("gradient_accumulation_steps");
  id.max_tokens_per_batch = integer("max_tokens_per_batch");
  id.max_seq_length = integer("max_seq_length");
  id.seed = integer("seed");
  id.data_seed = integer("data_seed");
  id.train_sampling_strategy = text("train_sampling_strategy");
  id.dataloader_drop_last = json_get<bool>(json, "dataloader_drop_last", origin);
  id.optimizer = json_get_or<std::string>(json, "optimizer", id.optimizer, origin);
  id.label_smoothing_factor = json_get_or<double>(json, "label_smoothing_factor", 0.0, origin);
  return id;
}

RunIdentity fresh_identity(const RunOptions& options, int num_ranks) {
  const TrainOptions& train = options.train;
  RunIdentity id;
  id.run_id = to_hex(std::random_device{}()).substr(8);
  id.task = options.model.task;
  id.per_device_train_batch_size = train.per_device_train_batch_size;
  id.gradient_accumulation_steps = train.gradient_accumulation_steps;
  id.global_batch_size = train.global_batch_size > 0 ? train.global_batch_size
                                                     : train.per_device_train_batch_size *
                                                           train.gradient_accumulation_steps * num_ranks;
  id.max_tokens_per_batch = train.max_tokens_per_batch;
  id.max_seq_length = options.data.max_seq_length;
  id.seed = train.seed;
  id.data_seed = train.data_seed.value_or(train.seed);
  id.train_sampling_strategy = train.train_sampling_strategy;
  id.dataloader_drop_last = train.dataloader_drop_last;
  id.optimizer = optimizer_family(optimizer_settings(train));
  id.label_smoothing_factor = train.label_smoothing_factor;
  return id;
}

void adopt_identity(const RunIdentity& stored, RunOptions& options) {
  TrainOptions& train = options.train;
  adopt("task", stored.task, options.model.task, options);
  if (train.global_batch_size == 0) train.global_batch_size = stored.global_batch_size;  // computed, not chosen
  adopt("global_batch_size", stored.global_batch_size, train.global_batch_size, options);
  adopt("per_device_train_batch_size", stored.per_device_train_batch_size, train.per_device_train_batch_size, options);
  adopt("gradient_accumulation_steps", stored.gradient_accumulation_steps, train.gradient_accumulation_steps, options);
  adopt("max_tokens_per_batch", stored.max_tokens_per_batch, train.max_tokens_per_batch, options);
  adopt("max_seq_length", stored.max_seq_length, options.data.max_seq_length, options);
  adopt("seed", stored.seed, train.seed, options);
  std::int64_t data_seed = train.data_seed.value_or(stored.data_seed);
  adopt("data_seed", stored.data_seed, data_seed, options);
  train.data_seed = data_seed;
  adopt("train_sampling_strategy", stored.train_sampling_strategy, train.train_sampling_strategy, options);
  adopt("dataloader_drop_last", stored.dataloader_drop_last, train.dataloader_drop_last, options);
  adopt("label_smoothing_factor", stored.label_smoothing_factor, train.label_smoothing_factor, options);
}

void check_same_run(const RunIdentity& stored, const RunIdentity& now) {
  if (stored.optimizer != now.optimizer)
    fail(ErrorKind::config, fmt::format("--optim: the run being resumed was trained by {} and its state is of no use to {}; give the --optim "
                                        "and --optim_args it was started with, or start a new run from its weights with "
                                        "--model_name_or_path and another --output_dir",
                                        stored.optimizer, now.optimizer));
  if (stored.model_hash != now.model_hash)
    fail(ErrorKind::data,
         "the checkpoint belongs to another model: its configuration differs from the one given by --model_name_or_path "
         "(or dropout options changed); resume with the model the run was started with");
  if (stored.labels != now.labels)
    fail(ErrorKind::data, fmt::format("the labels of the training data changed: the run was started with [{}], the data "
                                      "now has [{}]",
                                      fmt::join(stored.labels, ", "), fmt::join(now.labels, ", ")));
  if (stored.data_hash == now.data_hash) return;
  const auto file_hash = [](const RunIdentity& id) { return id.data_hash.substr(0, id.data_hash.find(':')); };
  if (file_hash(stored) != file_hash(now))
    fail(ErrorKind::data, "--train_file changed since the run was started; restore it, or start a new run in another --output_dir");
  fail(ErrorKind::data, "--train_file gives another number of examples than when the run was started; resume with the same --max_train_samples "
                        "and the same tokenizer, or start a new run in another --output_dir");
}

nlohmann::json describe_environment(const RunOptions& options, const std::string& reduction) {
  return {{"torch", TORCH_VERSION},
          {"cpu", at::get_cpu_capability()},
          {"kernels", name_of(instruction_set())},
          {"kernel_revision", kKernelRevision},
          {"fp32_products", has_own_fp32_products() ? "own" : "library"},
          {"threads_per_rank", at::get_num_threads()},
          {"bf16", options.train.bf16},
          {"fp16", options.train.fp16},
          {"reduction", reduction},
          {"reduce_dtype", options.train.reduce_dtype},
          {"adam_state_dtype", options.train.adam_state_dtype}};
}

std::vector<std::string> environment_differences(const nlohmann::json& first, const nlohmann::json& second,
                                                 const EnvironmentWords& words) {
  std::vector<std::string> differences;
  for (const auto& [key, value] : second.items()) {
    if (key == "kernels" && second.at("bf16") == false) continue;
    // Checkpoints of before there was a choice do not name it.
    static const nlohmann::json unnamed = {{"reduction", "tree"}, {"fp32_products", "library"}, {"kernel_revision", 1}};
    const nlohmann::json before = first.contains(key) ? first.at(key) : unnamed.value(key, nlohmann::json("?"));
    if (before != value)
      differences.push_back(
          fmt::format("{}: {} {}, {} {}", key, before.dump(), words.first, value.dump(), words.second));
  }
  return differences;
}

void warn_of_different_environments(const nlohmann::json& own, Communicator& world) {
  const std::vector<std::string> all = all_gather_strings(world, own.dump());
  const nlohmann::json first = nlohmann::json::parse(all.front());
  for (std::size_t rank = 1; rank < all.size(); ++rank) {
    const EnvironmentWords words{"on rank 0", fmt::format("on rank {}", rank)};
    const auto differences = environment_differences(first, nlohmann::json::parse(all[rank]), words);
    if (differences.empty()) continue;
    return log::warn("ranks compute under different conditions, so the result is not promised bit for bit: {}",
                     fmt::join(differences, "; "));
  }
}

nlohmann::json RunState::to_json() const {
  return {{"identity", identity.to_json()},
          {"step", step},
          {"skipped_steps", skipped_steps},
          {"loss_scale", scaler.is_on() ? nlohmann::json(scaler.scale()) : nlohmann::json()},
          {"loss_scale_growth_tracker", scaler.growth_tracker()},
          {"cursor", {{"epoch", cursor.epoch}, {"step_in_epoch", cursor.step_in_epoch}}},
          {"tokens_seen", tokens_seen},
          {"samples_seen", samples_seen},
          {"loss_sum", loss_sum},
          {"best_metric", std::isnan(best_metric) ? nlohmann::json() : nlohmann::json(best_metric)},
          {"best_step", best_step},
          {"log_history", log_history},
          {"interval_loss_sum", interval_loss_sum},
          {"interval_steps", interval_steps}};
}

RunState RunState::from_json(const nlohmann::json& json, const std::string& origin) {
  RunState state;
  try {
    state.identity = RunIdentity::from_json(json.at("identity"), origin);
    state.step = json_get<std::int64_t>(json, "step", origin);
    state.skipped_steps = json_get_or<std::int64_t>(json, "skipped_steps", 0, origin);
    if (json.contains("loss_scale") && json.at("loss_scale").is_number())
      state.scaler = LossScaler(json.at("loss_scale").get<double>(),
                                json_get<std::int64_t>(json, "loss_scale_growth_tracker", origin));
    state.cursor.epoch = json_get<std::int64_t>(json.at("cursor"), "epoch", origin);
    state.cursor.step_in_epoch = json_get<std::int64_t>(json.at("cursor"), "step_in_epoch", origin);
    state.tokens_seen = json_get<std::int64_t>(json, "tokens_seen", origin);
    state.samples_seen = json_get<std::int64_t>(json, "samples_seen", origin);
    state.loss_sum = json_get<double>(json, "loss_sum", origin);
    state.best_metric = json_get_or<double>(json, "best_metric", state.best_metric, origin);
    state.best_step = json_get<std::int64_t>(json, "best_step", origin);
    state.log_history = json.at("log_history");
    state.interval_loss_sum = json_get<double>(json, "interval_loss_sum", origin);
    state.interval_steps = json_get<std::int64_t>(json, "interval_steps", origin);
  } catch (const nlohmann::json::exception& e) {
    fail(ErrorKind::data, fmt::format("{}: the run state is incomplete: {}", origin, e.what()));
  }
  return state;
}

}  // namespace shardtune
