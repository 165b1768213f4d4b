#include "trainer/trainer.hpp"

#include <chrono>
#include <cmath>

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "core/error.hpp"
#include "core/huge_pages.hpp"
#include "core/log.hpp"
#include "core/memory.hpp"
#include "distributed/parallel/gradient_norm.hpp"

namespace shardtune {
namespace {

double now_seconds() {
  return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count();
}

}  // namespace

Trainer::Trainer(TrainerParts parts, TrainerSettings settings, RunState& state)
    : parts_(std::move(parts)), settings_(std::move(settings)), state_(state) {}

TrainOutcome Trainer::run() {
  try {
    return run_steps();
  } catch (const Error& e) {
    throw Error(e.kind(), fmt::format("step {}: {}", state_.step + 1, e.what()), e.where());
  }
}

TrainOutcome Trainer::run_steps() {
  start_seconds_ = now_seconds();
  first_step_ = saved_step_ = state_.step;
  if (settings_.eval_on_start && state_.step == 0 && state_.log_history.empty()) evaluate_and_publish();
  while (state_.step < settings_.max_steps) {
    const ControlWord word = share_control_word();
    if (!word.is_any_saving) parts_.saver.advance();
    if (word.must_stop) {
      if (saved_step_ != state_.step || state_.step == 0) save_now(true);
      parts_.saver.finish();
      if (!parts_.saver.has_failed()) log::info("stopped by a signal after step {} with a committed checkpoint", state_.step);
      return TrainOutcome::stopped_by_signal;
    }
    if (state_.step == first_step_ + 1) take_huge_pages();  // memory is now used as it will be
    after_step(train_step(parts_.loader.next()));
  }
  parts_.saver.finish();
  return TrainOutcome::finished;
}

void Trainer::take_huge_pages() {
  const double start = now_seconds();
  if (adopt_huge_pages()) log::debug("the heap has huge pages from now on, which took {:.2f} s", now_seconds() - start);
}

// The control word of the step: what any rank knows, all ranks know before they decide.
Trainer::ControlWord Trainer::share_control_word() {
  at::Tensor word = at::zeros({2}, at::kLong);
  auto* bits = word.data_ptr<std::int64_t>();
  bits[0] = parts_.stop_requested && parts_.stop_requested() ? 1 : 0;
  bits[1] = parts_.saver.poll_working() ? 1 : 0;
  parts_.world.all_reduce(word, ReduceOp::max).wait();
  return {.must_stop = bits[0] != 0, .is_any_saving = bits[1] != 0};
}

void Trainer::save_now(bool is_required) {
  if (parts_.saver.save(state_, is_required)) saved_step_ = state_.step;
}

Trainer::StepResult Trainer::train_step(const StepBatches& batches) {
  const double start = now_seconds();
  // As accelerate has it: a skipped step moves neither the schedule nor the optimizer's step count.
  const std::int64_t updates = state_.step - state_.skipped_steps;
  StepResult result{.learning_rate = parts_.schedule.at(updates), .tokens = batches.num_tokens,
                    .samples = batches.num_examples};
  std::vector<double> losses(batches.micro_batches.size(), 0.0);
  forward_backward(batches, losses);
  const double loss_scale = state_.scaler.scale();
  result.grad_norm = parts_.engine.grad_norm() / loss_scale;

  // Each micro-batch's loss is known to one rank; adding zeros is exact, so the sum below has the same bits everywhere.
  at::Tensor shared = at::from_blob(losses.data(), {static_cast<std::int64_t>(losses.size())}, at::kDouble).clone();
  parts_.world.all_reduce(shared, ReduceOp::sum).wait();
  for (std::int64_t i = 0; i < shared.numel(); ++i) result.loss += shared.data_ptr<double>()[i];
  if (has_overflowed(result)) {
    state_.scaler.update(true);
    ++state_.skipped_steps;
    log::warn("step {}: the gradients overflowed in fp16, so the step is skipped; the loss scale is now {}", state_.step + 1,
              state_.scaler.scale());
  } else {
    state_.scaler.update(false);
    const double clip = clip_factor(result.grad_norm, settings_.max_grad_norm);
    parts_.optimizer.step(result.learning_rate, clip / loss_scale, updates + 1);
  }
  parts_.engine.after_optimizer_step();
  ++state_.step;
  state_.cursor = batches.next;
  result.seconds = now_seconds() - start;
  return result;
}

bool Trainer::has_overflowed(const StepResult& result) const {
  if (std::isfinite(result.loss) && std::isfinite(result.grad_norm)) return false;
  if (state_.scaler.is_on()) return true;
  const bool is_bf16 = parts_.engine.parameters().front()->parameter->value.scalar_type() == at::kBFloat16;
  fail(
      ErrorKind::numeric,
      fmt::format("loss {} and gradient norm {} are not finite; lower --learning_rate{}. The last checkpoint is intact",
                  result.loss, result.grad_norm,
                  is_bf16 ? ", check the data, or train without --bf16" : " or check the data"));
}

void Trainer::forward_backward(const StepBatches& batches, std::vector<double>& losses) {
  ParallelEngine& engine = parts_.engine;
  const auto num_micro_batches = static_cast<std::int64_t>(batches.micro_batches.size());
  const double loss_scale = state_.scaler.scale();
  const double scale = loss_scale / static_cast<double>(std::max<std::int64_t>(1, batches.num_labelled));
  engine.begin_step(num_micro_batches);
  for (std::int64_t round = 0; round < engine.num_rounds(num_micro_batches); ++round) {
    const std::int64_t index = engine.micro_batch_of_round(num_micro_batches, round);
    if (index < 0 && !engine.runs_every_round()) continue;
    // Without a micro-batch of its own a rank takes part in the collectives with the first one; its gradients are dropped.
    const Batch& batch = batches.micro_batches[static_cast<std::size_t>(std::max<std::int64_t>(0, index))];
    const ForwardContext context{.is_training = true, .seed = settings_.seed, .step = state_.step, .micro_batch = index};
    // What the forward pass leaves behind, less gathered weights: those are counted as compute copies.
    const auto held = [&] { return tensor_bytes() - engine.memory().compute.current(); };
    const std::int64_t held_before = held();
    engine.begin_micro_batch(round);
    const ForwardOptions options{.loss_scale = scale, .label_smoothing = settings_.label_smoothing};
    const ModelOutput output = parts_.model.forward(batch, engine.runner(), context, options);
    activation_bytes_ = std::max(activation_bytes_, held() - held_before);
    if (index >= 0) losses[static_cast<std::size_t>(index)] = output.loss_sum.item<double>() / loss_scale;
    engine.backward(output.loss_sum);
  }
  engine.finish_step();
}

void Trainer::after_step(const StepResult& result) {
  state_.tokens_seen += result.tokens;
  state_.samples_seen += result.samples;
  // HF's logging_nan_inf_filter: what is not finite (a skipped step) counts as the mean so far.
  const double mean = state_.interval_loss_sum / static_cast<double>(std::max<std::int64_t>(1, state_.interval_steps));
  const double loss = std::isfinite(result.loss) ? result.loss : mean;
  state_.loss_sum += loss;
  state_.interval_loss_sum += loss;
  ++state_.interval_steps;
  process_tokens_ += result.tokens;
  process_samples_ += result.samples;
  const double elapsed = now_seconds() - start_seconds_;
  const double per_step = elapsed / static_cast<double>(state_.step - first_step_);
  if (parts_.world.rank() == 0) {
    const Progress progress{.step = state_.step, .max_steps = settings_.max_steps, .epoch = epoch(), .loss = result.loss,
                            .seconds = elapsed,
                            .remaining_seconds = per_step * static_cast<double>(settings_.max_steps - state_.step),
                            .samples_per_second = static_cast<double>(process_samples_) / elapsed,
                            .tokens_per_second = static_cast<double>(process_tokens_) / elapsed};
    for (const auto& observer : parts_.observers) observer->on_step(progress);
  }
  if (is_due(settings_.logging) || (settings_.logging_first_step && state_.step == 1)) log_step(result);
  const bool is_best = is_due(settings_.eval) && parts_.evaluate && evaluate_and_compare();
  // The best model is kept whether or not a save is due, so that it can be loaded at the end.
  if (is_best || is_due(settings_.save)) save_now(is_best || state_.step == settings_.max_steps);
}

void Trainer::log_step(const StepResult& result) {
  at::Tensor memory = at::zeros({parts_.world.size()}, at::kLong);
  memory[parts_.world.rank()] = resident_bytes();
  parts_.world.all_reduce(memory, ReduceOp::sum).wait();
  const std::vector<std::int64_t> per_rank(memory.data_ptr<std::int64_t>(), memory.data_ptr<std::int64_t>() + memory.numel());
  publish({{"loss", state_.interval_loss_sum / static_cast<double>(state_.interval_steps)},
           {"grad_norm", result.grad_norm},
           {"learning_rate", result.learning_rate},
           {"tokens", state_.tokens_seen},
           {"tokens_per_second", static_cast<double>(result.tokens) / result.seconds},
           {"samples_per_second", static_cast<double>(result.samples) / result.seconds},
           {"step_seconds", result.seconds},
           {"memory_bytes", per_rank}});
  state_.interval_loss_sum = 0;
  state_.interval_steps = 0;
  if (settings_.log_memory) log_memory();
}

void Trainer::log_memory() {
  const std::int64_t faults = page_faults();
  const MemoryUse& held = parts_.engine.memory();
  constexpr double kMib = 1048576.0;
  log::all_ranks::warn(
      "most memory so far, MiB: masters {:.1f}, optimizer {:.1f}, compute copies {:.1f}, gradients {:.1f}, partial sums {:.1f}, "
      "buffers {:.1f}, activations {:.1f}; all tensors {:.1f}, resident {:.1f}; {} page faults since the line before",
      static_cast<double>(held.masters.peak()) / kMib, static_cast<double>(parts_.optimizer.state_bytes()) / kMib,
      static_cast<double>(held.compute.peak()) / kMib, static_cast<double>(held.gradients.peak()) / kMib,
      static_cast<double>(held.partial_sums.peak()) / kMib, static_cast<double>(held.buffers.peak()) / kMib,
      static_cast<double>(activation_bytes_) / kMib, static_cast<double>(peak_tensor_bytes()) / kMib,
      static_cast<double>(peak_resident_bytes()) / kMib, faults - page_faults_);
  page_faults_ = faults;
}

nlohmann::json Trainer::evaluate_and_publish() {
  const nlohmann::json metrics = parts_.evaluate();
  publish(metrics);
  return metrics;
}

bool Trainer::evaluate_and_compare() {
  const nlohmann::json metrics = evaluate_and_publish();
  if (!settings_.load_best_model_at_end) return false;
  const auto metric = metrics.find(settings_.metric_for_best_model);
  if (metric == metrics.end())
    fail(ErrorKind::config, fmt::format("--metric_for_best_model = {}: the evaluation gives {}", settings_.metric_for_best_model,
                                        metrics.dump()));
  const double value = metric->get<double>();
  const bool is_better = std::isnan(state_.best_metric) ||
                         (settings_.greater_is_better ? value > state_.best_metric : value < state_.best_metric);
  if (!is_better) return false;
  state_.best_metric = value;
  state_.best_step = state_.step;
  return true;
}

// One record to metrics.jsonl, the display and HF's log_history (rates and memory stay out of the latter: it is part of
// the checkpoint, which must not depend on the machine's speed).
void Trainer::publish(nlohmann::json record) {
  record["step"] = state_.step;
  record["epoch"] = epoch();
  nlohmann::json history = record;
  for (const char* key : {"tokens", "tokens_per_second", "samples_per_second", "step_seconds", "memory_bytes", "eval_runtime",
                          "eval_samples_per_second"})
    history.erase(key);
  state_.log_history.push_back(std::move(history));
  if (parts_.world.rank() != 0) return;
  for (const auto& observer : parts_.observers) observer->on_record(record);
}

double Trainer::epoch() const { return static_cast<double>(state_.step) / static_cast<double>(settings_.steps_per_epoch); }

bool Trainer::is_due(const StepInterval& interval) const {
  return (interval.every > 0 && state_.step % interval.every == 0) || (interval.and_last && state_.step == settings_.max_steps);
}

}  // namespace shardtune
