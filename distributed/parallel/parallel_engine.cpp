#include "distributed/parallel/parallel_engine.hpp"

#include <algorithm>
#include <exception>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <c10/core/ScalarType.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>

#include "core/error.hpp"
#include "core/log.hpp"
#include "distributed/comm/exchange.hpp"
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
      buffers_(grid_, memory_.buffers),
      reducer_(make_gradient_reducer(options_.reduction, context(), options_.probe)),
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
  size_buffers();
  std::reverse(finish_order_.begin(), finish_order_.end());
  std::stable_partition(finish_order_.begin(), finish_order_.end(),
                        [](const ShardUnit* unit) { return !unit->unit().is_root; });
}

ShardContext ParallelEngine::context() {
  return {grid_, options_.plan, options_.compute_dtype, options_.reduce_dtype, buffers_, memory_};
}

// Buckets: no larger than the largest unit needs, and as many under way as hold one non-root unit: its reduction is
// then issued as a whole and runs while the next unit computes.
void ParallelEngine::size_buffers() {
  constexpr int kGatheredAtOnce = 3;  // see Note [When a copy may be overwritten]
  std::int64_t largest = 0;           // a unit in fp32, in bytes, were all ranks' slices as large as the largest
  std::int64_t largest_inner = 0;
  std::int64_t root_copy = 0;
  std::int64_t inner_copy = 0;
  int num_roots = 0;
  for (const auto& unit : units_) {
    std::int64_t numel_of_rank = 0;
    for (int rank = 0; rank < world().size(); ++rank) {
      std::int64_t numel = 0;
      for (const ShardedParameter& p : unit->parameters()) numel += p.layout.size(rank);
      numel_of_rank = std::max(numel_of_rank, numel);
    }
    const std::int64_t bytes = (4 * numel_of_rank + 63) / 64 * 64 * world().size();
    largest = std::max(largest, bytes);
    if (!unit->unit().is_root) largest_inner = std::max(largest_inner, bytes);
    std::int64_t& copy = unit->unit().is_root ? root_copy : inner_copy;
    copy = std::max(copy, unit->shared_copy_bytes());
    num_roots += unit->unit().is_root ? 1 : 0;
  }
  const std::int64_t bucket = std::min(options_.bucket_bytes, largest);
  for (BucketPool* const pool : {&buffers_.shards, &buffers_.replicas}) {
    pool->set_size({bucket, 2});
    const std::int64_t held = pool->bucket_bytes();  // less than asked for where the ranks' parts do not fill it
    pool->set_size({bucket, std::max(2, static_cast<int>((largest_inner + held - 1) / held))});
  }
  if (!options_.plan.reshard_after_backward) return;
  const auto num_inner = static_cast<int>(units_.size()) - num_roots;
  const int num_copies = options_.plan.reshard_after_forward ? kGatheredAtOnce : std::max(kGatheredAtOnce, num_inner);
  buffers_.root_class = 0;
  buffers_.unit_class = 1;
  buffers_.has_copies =
      buffers_.copies.make_class(root_copy, num_roots) && buffers_.copies.make_class(inner_copy, num_copies);
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
  if (!options_.share_frozen_on_host.empty()) share_frozen();
  options_.share_frozen_on_host.clear();
}

void ParallelEngine::share_frozen() {
  if (trainable_.size() == parameters_.size())
    return log::warn(
        "--share_frozen_weights: nothing is frozen, so there is nothing to share; name weights with --freeze");
  const std::vector<std::string> hosts = all_gather_strings(world(), options_.share_frozen_on_host);
  const auto first = std::find(hosts.begin(), hosts.end(), options_.share_frozen_on_host);
  const auto node = world().split(static_cast<int>(first - hosts.begin()), 0);
  bool is_shared = node->size() > 1;
  for (const auto& unit : units_) is_shared = is_shared && unit->share_frozen(*node);
  if (is_shared || node->rank() != 0) return;
  log::all_ranks::warn(
      "--share_frozen_weights: every rank on {} keeps frozen weights of its own, because {}",
      options_.share_frozen_on_host,
      node->size() == 1 ? "it is alone there" : "they get no shared memory (SHARDTUNE_COMM, /dev/shm)");
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
  reducer_->begin_step(*schedule_);
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
  reducer_->add(unit, round_);
  if (is_last_of_rank(round_)) finish_ready_units();
}

void ParallelEngine::finish_ready_units() {
  while (next_finish_ < finish_order_.size()) {
    ShardUnit* const next = finish_order_[next_finish_];
    if (std::find(completed_.begin(), completed_.end(), next) == completed_.end()) return;
    reducer_->finish(*next);
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
  while (next_finish_ < finish_order_.size()) reducer_->finish(*finish_order_[next_finish_++]);
  reducer_->finish_all();
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
  for (ByteCounter* counter :
       {&memory_.masters, &memory_.compute, &memory_.gradients, &memory_.partial_sums, &memory_.buffers}) {
    counter->reset_peak();
  }
}

EvaluationScope::EvaluationScope(ParallelEngine& engine)
    : engine_(engine), had_grad_mode_(at::GradMode::is_enabled()), num_exceptions_(std::uncaught_exceptions()) {
  engine_.expect(ParallelEngine::Phase::idle, "EvaluationScope");
  engine_.complete_kept_copies();
  engine_.unshard_roots();
  at::GradMode::set_enabled(false);
}

EvaluationScope::~EvaluationScope() {
  at::GradMode::set_enabled(had_grad_mode_);
  // Peers may never come to what is under way.
  if (std::uncaught_exceptions() > num_exceptions_) return;
  engine_.drop_gathers();
  engine_.reshard_roots();
}

}  // namespace shardtune
