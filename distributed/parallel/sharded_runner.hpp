#pragma once
// Runs units whose weights come and go. One autograd node per unit run covers every plan, recomputed or not:
//   forward:  gather, run the unit (with its own inner graph, or without one when it will be recomputed), free;
//   backward: gather, recompute if need be, re-entrant backward through the inner graph, free, and only then report
//             the unit complete: its .grad hold all of this micro-batch.
// A unit is complete when its node's backward returns, not when hooks were counted. The root unit never comes here.
#include <functional>
#include <map>
#include <set>

#include "distributed/parallel/shard_unit.hpp"
#include "models/unit.hpp"

namespace shardtune {

// Not thread-safe; belongs to the thread of its rank. Autograd runs CPU graphs in the calling thread, so several ranks
// may live in one process. Must outlive every graph that was built through it.
class ShardedRunner : public UnitRunner {
 public:
  using OnComplete = std::function<void(ShardUnit&)>;

  // recompute: keep only the inputs of units (gradient checkpointing). on_complete is called from inside backward, for
  // units with trainable parameters.
  ShardedRunner(bool recompute, OnComplete on_complete);

  void add_unit(ShardUnit& unit);  // non-root; outlives the runner
  void begin_micro_batch() { has_run_.clear(); }

  // zero3: collective over the ranks in forward and again in backward. Under grad mode a unit runs once per
  // micro-batch. Error{internal} for a unit that was not added or that runs twice. Inputs and outputs may be undefined
  // or not differentiable; outputs are new tensors outside of the inner graph.
  Tensors run(Unit& unit, const Tensors& inputs, const Forward& forward) override;

 private:
  bool recompute_;
  OnComplete on_complete_;
  std::map<const Unit*, ShardUnit*> units_;
  std::set<const Unit*> has_run_;
};

}  // namespace shardtune
