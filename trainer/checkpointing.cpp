#include "trainer/checkpointing.hpp"

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>

#include "core/error.hpp"
#include "core/log.hpp"
#include "trainer/schedule.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

StateSlice make_slice(const ShardedParameter& parameter, const std::string& field, const at::Tensor& like_master) {
  return {.name = parameter.parameter->name,
          .field = field,
          .global_shape = parameter.parameter->shape,
          .offset = parameter.slice_offset(),
          .data = parameter.slice_of(like_master)};
}

}  // namespace

StateView make_state_view(ParallelEngine& engine, Optimizer* optimizer) {
  StateView view;
  for (const ShardedParameter* p : engine.parameters()) {
    view.slices.push_back(make_slice(*p, "value", p->master));
    // Weights are always stored in fp32; frozen ones in another type, which never change, are copied.
    at::Tensor& data = view.slices.back().data;
    data = data.to(at::kFloat);
  }
  if (optimizer != nullptr) {
    for (const Optimizer::State& state : optimizer->states()) {
      for (std::size_t i = 0; i < state.tensors.size(); ++i)
        view.slices.push_back(make_slice(*state.parameter, optimizer->state_names()[i], state.tensors[i]));
    }
  }
  return view;
}

nlohmann::json load_checkpoint(CheckpointStore& store, const fs::path& directory, ParallelEngine& engine, Optimizer* optimizer) {
  const at::NoGradGuard no_grad;
  StateView view = make_state_view(engine, optimizer);
  nlohmann::json run = store.load(directory, view);
  engine.weights_loaded();
  if (optimizer != nullptr) {
    for (Optimizer::State& state : optimizer->states())
      for (const at::Tensor& tensor : state.tensors) engine.gather_like_master(*state.parameter, tensor);
  }
  return run;
}

fs::path find_resume_checkpoint(const TrainOptions& options, CheckpointStore& store) {
  const std::string& resume = options.resume_from_checkpoint;
  const bool is_search = resume == "true" || resume == "auto";
  if (!resume.empty() && !is_search && resume != "false") {
    if (!fs::is_directory(resume))
      fail(ErrorKind::config, fmt::format("--resume_from_checkpoint = {}: no such checkpoint directory (use true for the newest "
                                          "one in --output_dir)",
                                          resume));
    return resume;
  }
  if (is_search) {
    const fs::path newest = store.newest_usable();
    if (newest.empty() && resume == "true")
      fail(ErrorKind::config, fmt::format("--resume_from_checkpoint = true: {} holds no usable checkpoint; leave the option out "
                                          "to start, or use auto to resume or start",
                                          options.output_dir));
    return newest;
  }
  const auto existing = store.list();
  if (!existing.empty() && !options.overwrite_output_dir)
    fail(ErrorKind::config, fmt::format("--output_dir = {} already holds checkpoints (newest: {}); add --resume_from_checkpoint "
                                        "true to continue that run, or --overwrite_output_dir to set them aside, or choose "
                                        "another directory",
                                        options.output_dir, existing.front().directory.filename().string()));
  return {};
}

std::string hf_trainer_state(const RunState& state, const RunOptions& options, std::int64_t max_steps, std::int64_t steps_per_epoch) {
  const bool has_best = state.best_step >= 0;
  const TrainOptions& train = options.train;
  nlohmann::json json = {
      {"best_global_step", has_best ? nlohmann::json(state.best_step) : nlohmann::json()},
      {"best_metric", has_best ? nlohmann::json(state.best_metric) : nlohmann::json()},
      {"best_model_checkpoint", has_best ? nlohmann::json(fmt::format("{}/checkpoint-{}", train.output_dir, state.best_step))
                                         : nlohmann::json()},
      {"epoch", static_cast<double>(state.step) / static_cast<double>(steps_per_epoch)},
      {"eval_steps", resolve_interval(effective_eval_steps(train), max_steps)},
      {"global_step", state.step},
      {"is_hyper_param_search", false},
      {"is_local_process_zero", true},
      {"is_world_process_zero", true},
      {"log_history", state.log_history},
      {"logging_steps", resolve_interval(train.logging_steps, max_steps)},
      {"max_steps", max_steps},
      {"num_input_tokens_seen", state.tokens_seen},
      {"num_train_epochs", (max_steps + steps_per_epoch - 1) / steps_per_epoch},
      {"save_steps", resolve_interval(train.save_steps, max_steps)},
      {"stateful_callbacks", nlohmann::json::object()},
      {"total_flos", 0.0},
      {"train_batch_size", state.identity.per_device_train_batch_size},
      {"trial_name", nlohmann::json()},
      {"trial_params", nlohmann::json()}};
  return json.dump(2) + "\n";
}

}  // namespace shardtune
