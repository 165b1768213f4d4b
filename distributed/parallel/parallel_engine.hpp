#pragma once
// The facade of distributed/parallel: cuts a model over the ranks, runs its units, and hands finished gradients to the
// optimizer. One object per rank; every rank makes the same calls in the same order (what is collective says so).
//
// A training step (V micro-batches; see RoundSchedule for who computes which):
//   engine.begin_step(V);
//   for (k = 0; k < engine.num_rounds(V); ++k) {
//     index = engine.micro_batch_of_round(V, k);                // -1: none for this rank in this round
//     if (index < 0 && !engine.runs_every_round()) continue;
//     engine.begin_micro_batch(k);
//     loss = model.forward(index < 0 ? dummy batch : batch of index, engine.runner(), ...);
//     engine.backward(loss);                                    // the gradients of a dummy batch are discarded
//   }
//   engine.finish_step();
//   norm = engine.grad_norm();  optimizer reads ShardedParameter::gradient, updates its master and compute_copy
//   engine.after_optimizer_step();
// Evaluation: { EvaluationScope scope(engine); per round as above: forward under no-grad; the ranks without a batch run
// a dummy forward when runs_every_round(). }
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "distributed/parallel/gradient_reducer.hpp"
#include "distributed/parallel/memory_use.hpp"
#include "distributed/parallel/shard_unit.hpp"
#include "distributed/parallel/sharded_runner.hpp"

namespace shardtune {

struct ParallelOptions {
  ShardingPlan plan;                          // from resolve_sharding_plan
  int hsdp_shard_size = 0;                    // ranks per replica under hsdp, see ranks_per_node
  at::ScalarType compute_dtype = at::kFloat;  // kFloat, kBFloat16 or kHalf
  ReductionOrder reduction = ReductionOrder::tree;
  // kFloat or kBFloat16. tree: each micro-batch's gradients are rounded to it before they are summed (in fp32) and travel
  // so; sums of several micro-batches travel in fp32. fast: whatever travels is rounded to it.
  at::ScalarType reduce_dtype = at::kFloat;
  std::int64_t bucket_bytes = kDefaultBucketBytes;
  std::string share_frozen_on_host = {};  // ranks of the same name keep frozen weights once; only for plans that keep weights
  RecomputeOptions recompute = {};  // gradient checkpointing of the non-root units
  GradientProbe probe = {};         // tests only
};

class ParallelEngine {
 public:
  // Collective. `units` (Model::units()) and `world` outlive the engine. Sets every Parameter::value; masters are
  // undefined until weights_loaded(). Error{config} for a compute dtype or a shard size that cannot be honoured, or
  // when nothing is trainable.
  ParallelEngine(std::vector<Unit*> units, Communicator& world, ParallelOptions options);
  ParallelEngine(const ParallelEngine&) = delete;
  ParallelEngine& operator=(const ParallelEngine&) = delete;

  // All parameters in the model's order; stable addresses. trainable(): those with is_trainable.
  std::span<ShardedParameter* const> parameters() const noexcept { return parameters_; }
  std::span<ShardedParameter* const> trainable() const noexcept { return trainable_; }
  UnitRunner& runner() noexcept { return runner_; }
  const ShardingPlan& plan() const noexcept { return options_.plan; }
  // The ranks in the order of their distinct slices, see rank_grid.hpp. Rank 0 is rank 0 of the job.
  Communicator& world() const noexcept { return grid_.world(); }

  // Collective. Call after every rank has filled its distinct slices, p.slice_of(p.master), of every parameter (at
  // start and at resume): completes masters where several ranks hold the same, and refreshes the compute copies.
  // Afterwards the masters of frozen parameters are in the compute dtype where that loses nothing, so these cannot be
  // loaded a second time (masters of another dtype than fp32 are to be left alone).
  void weights_loaded();
  // Collective, for tensors the optimizer cuts like masters (exp_avg, ...), after their distinct slices were filled.
  void gather_like_master(const ShardedParameter& parameter, at::Tensor like_master);

  // Rounds: the same for training micro-batches and for evaluation batches. Local.
  std::int64_t num_rounds(std::int64_t num_micro_batches) const;
  std::int64_t micro_batch_of_round(std::int64_t num_micro_batches, std::int64_t round) const;
  // True: a rank without a micro-batch must still run one (its collectives are the others'). False: it must not.
  bool runs_every_round() const noexcept { return options_.plan.runs_every_round(); }

  // Local. Drops what an abandoned step left; a step may be abandoned before any rank's last micro-batch.
  void begin_step(std::int64_t num_micro_batches);
  // Collective where runs_every_round(); gathers the root unit for the rest of the step. (Under zero1 and zero2 the
  // first micro-batch of a step also gathers weights that the optimizer has changed; a rank that has none gathers them
  // in finish_step().)
  void begin_micro_batch(std::int64_t round);
  // Runs autograd from `loss` (a scalar that requires grad) and completes every unit. Collective where
  // runs_every_round().
  void backward(const at::Tensor& loss);
  // Collective. Afterwards every trainable parameter has its gradient: the sum over all V micro-batches. Frees the
  // root. (Reductions are under way since backward() of this rank's last micro-batch.)
  void finish_step();
  // Collective; between finish_step() and after_optimizer_step(). L2 norm of all gradients, same bits everywhere.
  double grad_norm();
  // Local. Frees the gradients. Compute copies whose masters are cut are completed from the other ranks' unit by unit in
  // the next forward pass (zero1, zero2). Also for a skipped step.
  void after_optimizer_step();

  const MemoryUse& memory() const noexcept { return memory_; }
  void reset_memory_peaks() noexcept;
  std::span<const std::unique_ptr<ShardUnit>> units() const noexcept { return units_; }
  const EngineBuffers& buffers() const noexcept { return buffers_; }

 private:
  friend class EvaluationScope;
  enum class Phase { idle, in_step, in_micro_batch, finished };

  ShardContext context();
  void size_buffers();
  void share_frozen();
  void complete(ShardUnit& unit);
  void finish_ready_units();
  bool is_last_of_rank(std::int64_t round) const;
  void complete_kept_copies();
  void drop_gathers();
  void reshard_roots() noexcept;
  void unshard_roots();
  void expect(Phase phase, const char* call) const;

  ParallelOptions options_;
  RankGrid grid_;
  MemoryUse memory_;
  EngineBuffers buffers_;
  std::vector<std::unique_ptr<ShardUnit>> units_;  // in the model's order
  std::vector<ShardedParameter*> parameters_;
  std::vector<ShardedParameter*> trainable_;
  std::unique_ptr<GradientReducer> reducer_;
  ShardedRunner runner_;
  Phase phase_ = Phase::idle;
  std::optional<RoundSchedule> schedule_;
  std::int64_t round_ = 0;
  std::vector<const ShardUnit*> completed_;  // in this micro-batch
  // Units with trainable parameters as they are reduced, the same on all ranks: backward, roots last.
  std::vector<ShardUnit*> finish_order_;
  std::size_t next_finish_ = 0;  // units before it were handed to the reducer for good
};

// Gathers the root unit for a stretch of evaluation and sets no-grad mode. Construction is collective, destruction
// local; while an exception passes, gathers are left as they are. Not inside a training step.
class EvaluationScope {
 public:
  explicit EvaluationScope(ParallelEngine& engine);
  ~EvaluationScope();
  EvaluationScope(const EvaluationScope&) = delete;
  EvaluationScope& operator=(const EvaluationScope&) = delete;

 private:
  ParallelEngine& engine_;
  bool had_grad_mode_;
  int num_exceptions_;
};

}  // namespace shardtune
