#pragma once
// Runs units whose weights come and go. One autograd node per unit run covers every plan, recomputed or not:
//   forward:  gather, run the unit (with its own inner graph, or without one when it will be recomputed), free;
//   backward: gather, recompute if need be, re-entrant backward through the inner graph, free, and only then report
//             the unit complete: its .grad hold all of this micro-batch.
// A unit is complete when its node's backward returns, not when hooks were counted. The root unit never comes here.
// Before a unit computes, the gather of the one that comes after it is issued, so that it runs meanwhile.
#include <functional>
#include <map>
#include <memory>
#include <vector>

#include "distributed/parallel/recompute_policy.hpp"
#include "distributed/parallel/shard_unit.hpp"
#include "models/unit.hpp"

namespace shardtune {

// Not thread-safe; belongs to the thread of its rank. Autograd runs CPU graphs in the calling thread, so several ranks
// may live in one process. Must outlive every graph that was built through it.
class ShardedRunner : public UnitRunner {
 public:
  using OnComplete = std::function<void(ShardUnit&)>;
  struct Options {
    RecomputeOptions recompute;          // gradient checkpointing
    bool reshard_after_forward = false;  // of the plan
  };

  // on_complete is called from inside backward, for units with trainable parameters.
  ShardedRunner(Options options, OnComplete on_complete);

  void add_unit(ShardUnit& unit);  // non-root, in execution order; outlives the runner
  void begin_micro_batch();
  // Collective where the plan frees weights: issues the gather of the first unit.
  void prefetch_first();

  // Plans that free weights: collective over the ranks in forward and again in backward. Under grad mode a unit runs
  // once per micro-batch. Error{internal} for a unit that was not added or that runs twice. Inputs and outputs may be
  // undefined or not differentiable; outputs are new tensors outside of the inner graph.
  Tensors run(Unit& unit, const Tensors& inputs, const Forward& forward) override;
  std::shared_ptr<RecomputeContext> recompute_context(const Unit& unit) override;

 private:
  class UnitBackward;
  struct Entry {
    ShardUnit* unit;
    bool has_node = false;  // ran under grad mode in this micro-batch, so its backward will come
    std::shared_ptr<RecomputeContext> context = {};  // handed out for the next run
  };

  std::size_t index_of(const Unit& unit) const;
  // The unit's forward pass in the first go, its weights there. Fills in what the node keeps.
  Tensors run_forward(UnitBackward& node, std::size_t index, const Tensors& inputs, const Forward& forward);
  // Before a unit is unsharded: gathers of others were for units that this pass has left out. Under plans that free
  // weights between the passes they hold copies that are counted out, see ParallelEngine::size_buffers().
  void drop_other_gathers(std::size_t index);
  void prefetch_next(std::size_t index);
  void prefetch_previous(std::size_t index);

  Options options_;
  RecomputePolicy policy_;
  OnComplete on_complete_;
  std::vector<Entry> entries_;  // in execution order
  std::map<const Unit*, std::size_t> index_of_;
};

}  // namespace shardtune
