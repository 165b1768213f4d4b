#include <algorithm>
#include <optional>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include "checkpoint/agreement.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/output_lock.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"
#include "core/log.hpp"
#include "core/memory.hpp"
#include "distributed/comm/exchange.hpp"
#include "distributed/parallel/sharding_plan.hpp"
#include "kernels/instruction_set.hpp"
#include "trainer/build.hpp"
#include "trainer/checkpointing.hpp"
#include "trainer/commands.hpp"
#include "trainer/precision_check.hpp"
#include "trainer/stop_signal.hpp"
#include "trainer/weights.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

// Everything a training run owns, in order of construction; destroyed in reverse.
class TrainRun {
 public:
  TrainRun(const RunOptions& options, Communicator& world)
      : options_(options),
        world_(world),
        store_(options.train.output_dir, world, static_cast<std::size_t>(options.train.checkpoint_staging_mb) << 20,
               static_cast<int>(options.train.ranks_per_file), options.train.checkpoint_local_dir),
        saver_(store_,
               {.in_background = options.train.async_save,
                .skips_on_overlap = options.train.on_save_overlap == "skip",
                .stops_on_error = options.train.on_save_error == "stop",
                .keep = static_cast<int>(options.train.save_total_limit)},
               [this](const RunState& state) { return make_view(state); }) {
    store_.set_compression(options.train.checkpoint_compression == "zstd");
  }

  int run();

 private:
  void prepare_output_dir();
  void find_run_to_resume();
  void build_data_and_model();
  void decide_identity();
  void load_weights();
  StateView make_view(const RunState& state);
  fs::path find_checkpoint(std::int64_t step);
  bool finish();
  nlohmann::json environment() const { return describe_environment(options_, describe_reduction(parallel_, world_.size())); }
  nlohmann::json evaluate_now();
  TrainOutcome train();

  RunOptions options_;  // those of the run being resumed where there is one
  Communicator& world_;
  OutputLock lock_;  // on rank 0
  fs::path resume_from_;
  std::int64_t resumed_step_ = -1;
  std::optional<RunState> resumed_;
  ModelSource source_;
  std::vector<std::string> labels_;
  std::unique_ptr<Tokenizer> tokenizer_;
  std::unique_ptr<Model> model_;
  CompanionFiles companions_;  // on rank 0, as they were when the run started
  std::unique_ptr<Dataset> train_data_, eval_data_;
  RunState state_;
  ParallelOptions parallel_;
  std::unique_ptr<ParallelEngine> engine_;
  std::unique_ptr<Optimizer> optimizer_;
  TrainerSettings settings_;
  CheckpointStore store_;  // after the tensors that a save under way reads
  Saver saver_;
};

int TrainRun::run() {
  check_same_options(options_, world_);
  check_precision(options_.train);
  parallel_ = parallel_options(options_.train, world_);
  warn_of_different_environments(environment(), world_);
  prepare_output_dir();
  find_run_to_resume();
  choose_bucket_size(options_.train, world_, parallel_);
  build_data_and_model();
  decide_identity();
  load_weights();
  if (state_.best_step >= 0 && !find_checkpoint(state_.best_step).empty()) saver_.set_saved_best_step(state_.best_step);
  const TrainOutcome outcome = train();
  // Without the last checkpoint nobody may rely on this run's end, whatever else has worked.
  const int save_failed = saver_.has_failed() ? exit_code(ErrorKind::io) : 0;
  if (outcome == TrainOutcome::stopped_by_signal) return save_failed != 0 ? save_failed : kExitStoppedBySignal;
  return finish() ? save_failed : exit_code(ErrorKind::io);
}

void TrainRun::prepare_output_dir() {
  const fs::path directory = options_.train.output_dir;
  std::string problem;
  if (world_.rank() == 0) {
    try {
      make_directories_durably(directory);
      if (::access(directory.c_str(), W_OK) != 0)
        problem =
            fmt::format("--output_dir = {}: not writable by this user; choose another directory", directory.string());
    } catch (const Error& e) {
      problem = fmt::format("--output_dir = {}: {}", directory.string(), e.what());
    }
  }
  problem = broadcast_string(world_, problem, 0);
  if (!problem.empty()) fail(ErrorKind::io, problem);
  run_agreed(world_, "starting in " + directory.string(), [&] {
    if (world_.rank() == 0) lock_ = OutputLock(directory, "train");
  });
}

void TrainRun::find_run_to_resume() {
  resume_from_ = find_resume_checkpoint(options_.train, store_);
  if (resume_from_.empty()) return;
  const nlohmann::json stored = read_checkpoint_run_state(resume_from_);
  if (!stored.contains("state"))
    fail(ErrorKind::config, fmt::format("--resume_from_checkpoint: {} was imported, it is no run that could go on; start from it "
                                        "with --model_name_or_path {} and another --output_dir",
                                        resume_from_.string(), resume_from_.string()));
  resumed_ = RunState::from_json(stored.at("state"), resume_from_.string());
  resumed_step_ = resumed_->step;
  adopt_identity(resumed_->identity, options_);
  for (const std::string& difference : environment_differences(stored.at("environment"), environment()))
    log::warn("resuming under other conditions, so the result is no longer promised bit for bit: {}", difference);
}

void TrainRun::build_data_and_model() {
  source_ = find_model_source(options_.model);
  tokenizer_ = build_tokenizer(source_);
  DatasetOptions train_options = dataset_options(options_, options_.data.train_file, 0);
  train_options.max_rows = options_.data.max_train_samples;
  if (options_.model.task == "text-classification") labels_ = training_labels(source_.config, collect_labels(train_options));
  model_ = build_model(source_, options_.model, labels_);
  freeze_parameters(*model_, options_.model.freeze);
  if (world_.rank() == 0) companions_ = companion_files(*model_, source_);
  const std::int64_t max_length = resolve_max_length(options_.data, *model_, source_);
  train_options.max_length = max_length;
  train_options.num_token_ids = model_->num_token_ids();
  train_data_ = build_dataset(train_options, options_.model.task, labels_, *tokenizer_);
  if (!options_.data.validation_file.empty()) {
    DatasetOptions eval_options = dataset_options(options_, options_.data.validation_file, max_length);
    eval_options.max_rows = options_.data.max_eval_samples;
    eval_options.num_token_ids = model_->num_token_ids();
    eval_data_ = build_dataset(eval_options, options_.model.task, labels_, *tokenizer_);
  }
}

void TrainRun::decide_identity() {
  RunIdentity now = fresh_identity(options_, world_.size());
  now.run_id = broadcast_string(world_, now.run_id, 0);
  now.labels = labels_;
  now.model_hash = to_hex(hash_bytes(model_->config_json().dump()));
  now.data_hash = to_hex(hash_file_bytes(options_.data.train_file)) + ":" + std::to_string(train_data_->size());
  state_.identity = now;
  if (resumed_) {
    check_same_run(resumed_->identity, now);
    state_ = std::move(*resumed_);
  }
  if (!options_.train.fp16) state_.scaler = LossScaler();
  else if (!state_.scaler.is_on()) state_.scaler = LossScaler(LossScaler::kInitialScale, 0);
  const RunIdentity& id = state_.identity;
  const LoaderOptions loader = loader_options(id, *model_);
  settings_ = trainer_settings(options_, steps_per_epoch(train_data_->size(), loader));
  log::info(
      "{} examples, {} steps of {} examples ({} micro-batches of at most {}), {} ranks of {} threads, sharding {}, {}, "
      "kernels for {}",
      train_data_->size(), settings_.max_steps, id.global_batch_size,
      (id.global_batch_size + id.per_device_train_batch_size - 1) / id.per_device_train_batch_size,
      id.per_device_train_batch_size, world_.size(), at::get_num_threads(), plan_request(options_.train).name,
      options_.train.bf16   ? "bf16"
      : options_.train.fp16 ? "fp16"
                            : "fp32",
      name_of(instruction_set()));
}

void TrainRun::load_weights() {
  const TrainOptions& train = options_.train;
  engine_ = std::make_unique<ParallelEngine>(model_->units(), world_, parallel_);
  optimizer_ = std::make_unique<Optimizer>(*engine_, optimizer_settings(train));
  optimizer_->set_before_update([this](const Optimizer::State& state) {
    store_.preserve(state.parameter->master);
    for (const at::Tensor& tensor : state.tensors) store_.preserve(tensor);
  });
  const auto seed = static_cast<std::uint64_t>(state_.identity.seed);
  if (!resume_from_.empty()) {
    load_checkpoint(store_, resume_from_, *engine_, optimizer_.get());
    log::info("resuming from {} (step {})", resume_from_.string(), state_.step);
  } else if (!source_.checkpoint_dir.empty()) {
    load_checkpoint(store_, source_.checkpoint_dir, *engine_, nullptr);
  } else if (!source_.weights_dir.empty()) {
    const WeightReport report = load_pretrained(source_.weights_dir, *model_, *engine_, seed);
    if (!report.newly_initialized.empty())
      log::info("newly initialised, to be trained: {}", fmt::join(report.newly_initialized, ", "));
    if (!report.unexpected.empty()) log::info("tensors of the file that this task does not use: {}", fmt::join(report.unexpected, ", "));
  } else {
    initialize_randomly(*engine_, seed);
    log::info("random weights from {}", source_.config_file.string());
  }
  store_.prepare_resume(resume_from_.empty() ? -1 : state_.step, state_.identity.run_id);
}

nlohmann::json TrainRun::evaluate_now() {
  const InferenceSetup setup{.model = *model_,
                             .engine = *engine_,
                             .world = world_,
                             .batch_size = options_.train.per_device_eval_batch_size,
                             .label_smoothing = options_.train.label_smoothing_factor};
  return evaluate(setup, *eval_data_);
}

StateView TrainRun::make_view(const RunState& state) {
  StateView view = make_state_view(*engine_, optimizer_.get());
  view.run = {{"step", state.step}, {"run_id", state.identity.run_id}, {"state", state.to_json()}, {"environment", environment()}};
  if (world_.rank() == 0) {
    for (const auto& [name, content] : companions_) view.side_files.push_back({name, content});
    view.side_files.push_back({"trainer_state.json", hf_trainer_state(state, options_, settings_.max_steps, settings_.steps_per_epoch)});
  }
  return view;
}

TrainOutcome TrainRun::train() {
  std::vector<std::unique_ptr<Observer>> observers;
  if (world_.rank() == 0) {
    write_file_durably(fs::path(options_.train.output_dir) / "resolved.cfg", resolved_text(options_));
    observers.push_back(make_metrics_writer(options_.train.output_dir, state_.step));
    observers.push_back(make_progress_display(!options_.train.disable_tqdm && ::isatty(STDERR_FILENO) != 0));
  }
  const LearningRateSchedule schedule(options_.train.lr_scheduler_type, options_.train.learning_rate,
                                      resolve_warmup(options_.train.warmup_steps, options_.train.warmup_ratio, settings_.max_steps),
                                      settings_.max_steps);
  StepLoader loader(*train_data_, loader_options(state_.identity, *model_), state_.cursor);
  Trainer trainer({.model = *model_,
                   .engine = *engine_,
                   .optimizer = *optimizer_,
                   .schedule = schedule,
                   .loader = loader,
                   .world = world_,
                   .observers = observers,
                   .evaluate = eval_data_ ? [this] { return evaluate_now(); } : std::function<nlohmann::json()>{},
                   .saver = saver_,
                   .stop_requested = stop_requested},
                  settings_, state_);
  return trainer.run();
}

// A committed one in the output directory or, of a run that goes on in another one, where it came from; else empty.
fs::path TrainRun::find_checkpoint(std::int64_t step) {
  const auto find_in = [&](CheckpointStore& store) {
    for (const CheckpointInfo& info : store.list())
      if (info.is_committed && info.step == step) return info.directory;
    return fs::path();
  };
  fs::path found = find_in(store_);
  // Later ones there are another run's.
  if (found.empty() && resumed_step_ >= step) {
    CheckpointStore before(absolute_checkpoint(resume_from_).parent_path(), world_);
    found = find_in(before);
  }
  return found;
}

// False when the exported model is not the best one although that was asked for.
bool TrainRun::finish() {
  bool is_wanted = true;
  if (const std::int64_t best = state_.best_step; settings_.load_best_model_at_end && best >= 0 && best != state_.step) {
    fs::path checkpoint = find_checkpoint(best);
    is_wanted = !checkpoint.empty();
    if (const std::int64_t saved = saver_.saved_best_step(); !is_wanted && saved >= 0) checkpoint = find_checkpoint(saved);
    if (!is_wanted)
      log::error(
          "the best model, of step {}, cannot be loaded: saving it failed, or its checkpoint is gone from {}; {} is exported instead",
          best, options_.train.output_dir,
          checkpoint.empty() ? fmt::format("the last one, of step {},", state_.step)
                             : fmt::format("the best one that was saved, of step {},", saver_.saved_best_step()));
    if (!checkpoint.empty()) load_checkpoint(store_, checkpoint, *engine_, nullptr);
    if (is_wanted)
      log::info("loaded the best model, of step {} ({} = {:.6g})", best, settings_.metric_for_best_model,
                state_.best_metric);
  }
  const fs::path directory = fs::path(options_.train.output_dir) / "model";
  export_model(world_, *engine_, directory, companions_);
  log::info("trained {} steps, mean loss {:.4f}; model in Hugging Face layout: {}", state_.step,
            state_.step > 0 ? state_.loss_sum / static_cast<double>(state_.step) : 0.0, directory.string());
  return is_wanted;
}

}  // namespace

int run_train(const RunOptions& options, Communicator& world) { return TrainRun(options, world).run(); }

}  // namespace shardtune
