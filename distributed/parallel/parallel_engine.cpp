#include "distributed/parallel/parallel_engine.hpp"

#include <algorithm>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include "core/error.hpp"
#include "distributed/parallel/gradient_norm.hpp"

namespace shardtune {
namespace {

const ParallelOptions& checked(const ParallelOptions& options) {
  const at::ScalarType compute = options.compute_dtype;
  if (compute != at::kFloat && compute != at::kBFloat16 && compute != at::kHalf) {
    fail(ErrorKind::config,
         fmt::format("compute dtype {} is not supported; use fp32, bf16 or fp16", c10::toString(compute)));
  }
  if (options.reduce_dtype != at::kFloat && options.reduce_dtype != at::kBFloat16) {
    fail(ErrorKind::config,
         fmt::format("reduce dtype {} is not supported; use fp32 or bf16", c10::toString(options.reduce_dtype)));
  }
  return options;
}

}  // namespace

ParallelEngine::ParallelEngine(std::vector<Unit*> units, Communicator& world, ParallelOptions options)
    : options_(checked(options)),
      grid_(world, options_.plan, options_.hsdp_shard_size),
      reducer_(context(), options_.probe),
      runner_({.recompute = options_.recompute, .reshard_after_forward = options_.plan.reshard_after_forward},
              [this](ShardUnit& unit) { complete(unit); }) {
  for (Unit* unit : units) {
    units_.push_back(std::make_unique<ShardUnit>(*unit, context()));
    ShardUnit& sharded = *units_.back();
    if (!unit->is_root) runner_.add_unit(sharded);
    if (sharded.has_trainable()) finish_order_.push_back(&sharded);
    for (ShardedParameter& p : sharded.parameters()) {
      parameters_.push_back(&p);
      if (p.parameter->is_trainable) trainable_.push_back(&p);
    }
  }
  if (trainable_.empty()) {
    fail(ErrorKind::config, "the model has no trainable parameter; unfreeze at least one before training");
  }
  std::reverse(finish_order_.begin(), finish_order_.end());
  std::stable_partition(finish_order_.begin(), finish_order_.end(),
                        [](const ShardUnit* unit) { return !unit->unit().is_root; });
}

ShardContext ParallelEngine::context() {
  return {grid_, options_.plan, options_.compute_dtype, options_.reduce_dtype, memory_};
}

void ParallelEngine::weights_loaded() {
  for (const auto& unit : units_) {
    unit->drop_gather();
    unit->reshard();
    unit->gather_masters();
  }
  // One unit ahead: the next gather runs while this one is unpacked.
  ShardUnit* before = nullptr;
  for (const auto& unit : units_) {
    unit->begin_refresh();
    if (before != nullptr) before->finish_refresh();
    before = unit.get();
  }
  before->finish_refresh();
  for (const auto& unit : units_) unit->drop_frozen_masters();
}

// What the forward pass has not brought up to date, in the order in which it would have been.
void ParallelEngine::complete_kept_copies() {
  if (options_.plan.reshard_after_backward) return;
  for (std::size_t i = 0; i < units_.size(); ++i) {
    units_[i]->begin_unshard();
    if (i + 1 < units_.size()) units_[i + 1]->begin_unshard();
    units_[i]->unshard();
  }
}

void ParallelEngine::drop_gathers() {
  for (const auto& unit : units_) unit->drop_gather();
}

void ParallelEngine::gather_like_master(const ShardedParameter& parameter, at::Tensor like_master) {
  for (const auto& unit : units_) {
    for (const ShardedParameter& p : unit->parameters()) {
      if (&p == &parameter) return unit->gather_replicas(p, std::move(like_master));
    }
  }
  fail(ErrorKind::internal, "gather_like_master: a parameter of another engine");
}

std::int64_t ParallelEngine::num_rounds(std::int64_t num_micro_batches) const {
  return RoundSchedule(options_.plan, {grid_.num_shards(), grid_.num_replicas()}, num_micro_batches).num_rounds();
}

std::int64_t ParallelEngine::micro_batch_of_round(std::int64_t num_micro_batches, std::int64_t round) const {
  const RoundSchedule schedule(options_.plan, {grid_.num_shards(), grid_.num_replicas()}, num_micro_batches);
  return schedule.micro_batch(world().rank(), round);
}

void ParallelEngine::expect(Phase phase, const char* call) const {
  if (phase_ != phase) fail(ErrorKind::internal, fmt::format("ParallelEngine::{} was called out of order", call));
}

void ParallelEngine::unshard_roots() {
  for (const auto& unit : units_) {
    if (unit->unit().is_root) unit->begin_unshard();
  }
  runner_.prefetch_first();
  for (const auto& unit : units_) {
    if (unit->unit().is_root) unit->unshard();
  }
}

void ParallelEngine::reshard_roots() noexcept {
  for (const auto& unit : units_) {
    if (unit->unit().is_root) unit->reshard();
  }
}

void ParallelEngine::begin_step(std::int64_t num_micro_batches) {
  schedule_.emplace(options_.plan, RoundSchedule::Shape{grid_.num_shards(), grid_.num_replicas()}, num_micro_batches);
  reducer_.begin_step(*schedule_);
  next_finish_ = 0;
  for (const auto& unit : units_) {
    unit->drop_gather();
    unit->reshard();
    unit->drop_gradients();
    unit->release_gradients();
  }
  phase_ = Phase::in_step;
}

void ParallelEngine::begin_micro_batch(std::int64_t round) {
  expect(Phase::in_step, "begin_micro_batch");
  check_internal(round >= 0 && round < schedule_->num_rounds(), "begin_micro_batch: no such round");
  round_ = round;
  completed_.clear();
  runner_.begin_micro_batch();
  unshard_roots();
  phase_ = Phase::in_micro_batch;
}

bool ParallelEngine::is_last_of_rank(std::int64_t round) const {
  if (round + 1 == schedule_->num_rounds()) return true;
  return !runs_every_round() && schedule_->micro_batch(world().rank(), round + 1) < 0;
}

void ParallelEngine::complete(ShardUnit& unit) {
  expect(Phase::in_micro_batch, "backward");
  completed_.push_back(&unit);
  reducer_.add(unit, round_);
  if (is_last_of_rank(round_)) finish_ready_units();
}

void ParallelEngine::finish_ready_units() {
  while (next_finish_ < finish_order_.size()) {
    ShardUnit* const next = finish_order_[next_finish_];
    if (std::find(completed_.begin(), completed_.end(), next) == completed_.end()) return;
    reducer_.finish(*next);
    ++next_finish_;
  }
}

void ParallelEngine::backward(const at::Tensor& loss) {
  expect(Phase::in_micro_batch, "backward");
  complete_kept_copies();
  torch::autograd::backward({loss}, {});
  // Left are the root (its gradients come from the outer graph, complete only now) and units the loss does not depend
  // on.
  for (ShardUnit* unit : finish_order_) {
    const bool is_completed = std::find(completed_.begin(), completed_.end(), unit) != completed_.end();
    if (!is_completed) complete(*unit);
  }
  for (const auto& unit : units_) {
    if (!unit->unit().is_root) unit->reshard();  // kept since a forward whose output the loss does not depend on
  }
  phase_ = Phase::in_step;
}

void ParallelEngine::finish_step() {
  expect(Phase::in_step, "finish_step");
  complete_kept_copies();
  drop_gathers();
  reshard_roots();
  while (next_finish_ < finish_order_.size()) reducer_.finish(*finish_order_[next_finish_++]);
  reducer_.finish_all();
  phase_ = Phase::finished;
}

double ParallelEngine::grad_norm() {
  expect(Phase::finished, "grad_norm");
  return gradient_norm(world(), trainable_);
}

void ParallelEngine::after_optimizer_step() {
  expect(Phase::finished, "after_optimizer_step");
  for (const auto& unit : units_) {
    unit->release_gradients();
    unit->masters_changed();
  }
  phase_ = Phase::idle;
}

void ParallelEngine::reset_memory_peaks() noexcept {
  for (ByteCounter* counter : {&memory_.masters, &memory_.compute, &memory_.gradients, &memory_.partial_sums}) {
    counter->reset_peak();
  }
}

EvaluationScope::EvaluationScope(ParallelEngine& engine) : engine_(engine), had_grad_mode_(at::GradMode::is_enabled()) {
  engine_.expect(ParallelEngine::Phase::idle, "EvaluationScope");
  engine_.complete_kept_copies();
  engine_.unshard_roots();
  at::GradMode::set_enabled(false);
}

EvaluationScope::~EvaluationScope() {
  at::GradMode::set_enabled(had_grad_mode_);
  engine_.drop_gathers();
  engine_.reshard_roots();
}

}  // namespace shardtune
