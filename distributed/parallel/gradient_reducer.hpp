#pragma once
// From the gradients of a step's micro-batches to ShardedParameter::gradient: the sum over all of them, each slice at
// its owner, gathered over replicas. The order of adding is what the implementations differ in.
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <string>

#include "distributed/parallel/round_schedule.hpp"
#include "distributed/parallel/shard_unit.hpp"

namespace shardtune {

// tree: the canonical tree of tree_accumulator.hpp, the same bits for any number of ranks and any plan. fast: whatever
// order costs least for these ranks and this plan; the same bits whenever both are the same.
enum class Reduction { tree, fast };

// Test seam: sees (and may spoil) what leaves this rank for the owners: flat gradients, one per trainable parameter.
using GradientProbe = std::function<void(const std::string& unit_name, const Pieces& gradients)>;

// Not thread-safe. Collective calls: every rank makes them for the same units in the same order.
class GradientReducer {
 public:
  virtual ~GradientReducer() = default;
  // Local. Forgets everything of an earlier step.
  virtual void begin_step(const RoundSchedule& schedule) = 0;
  // Takes the unit's .grad as that of this rank's micro-batch in `round`; a rank without one contributes nothing and
  // its .grad is discarded. Collective when the plan reduces every micro-batch: for every unit with trainable
  // parameters once per round. Waits for the exchange that the add() before issued.
  virtual void add(ShardUnit& unit, std::int64_t round) = 0;
  // Collective, once per unit after its last add(). Starts the unit's way to ShardedParameter::gradient and moves the
  // units before it one stage on, so that their communication had the time since the last call to run.
  void finish(ShardUnit& unit);
  void finish_all();  // collective; completes every unit given to finish()

 protected:
  // Runs the unit's stages until something is under way (true) or the unit has its gradient (false).
  virtual bool advance(ShardUnit& unit) = 0;
  virtual void count_partials() = 0;  // to MemoryUse
  void forget_finishing() { finishing_.clear(); }

 private:
  std::deque<ShardUnit*> finishing_;
};

std::unique_ptr<GradientReducer> make_gradient_reducer(Reduction reduction, const ShardContext& context,
                                                       GradientProbe probe);

}  // namespace shardtune
