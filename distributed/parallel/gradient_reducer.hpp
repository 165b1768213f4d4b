#pragma once
// From the gradients of a step's micro-batches to ShardedParameter::gradient: the sum over all of them, each slice at
// its owner, gathered over replicas. The order of adding is what the implementations differ in.
#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "distributed/parallel/round_schedule.hpp"
#include "distributed/parallel/shard_unit.hpp"

namespace shardtune {

// tree: the canonical tree of tree_accumulator.hpp, the same bits for any number of ranks and any plan. fast: whatever
// order costs least for these ranks and this plan; the same bits whenever both are the same.
enum class ReductionOrder { tree, fast };

// Test seam: sees (and may spoil) what leaves this rank for the owners: flat gradients, one per trainable parameter.
using GradientProbe = std::function<void(const std::string& unit_name, const Pieces& gradients)>;

// Not thread-safe. Collective calls: every rank makes them for the same units in the same order.
class GradientReducer {
 public:
  virtual ~GradientReducer() = default;
  // Local. Forgets everything of an earlier step.
  void begin_step(const RoundSchedule& schedule);
  // Takes the unit's .grad as that of this rank's micro-batch in `round`; a rank without one contributes nothing and
  // its .grad is discarded. Collective when the plan reduces every micro-batch: for every unit with trainable
  // parameters once per round.
  virtual void add(ShardUnit& unit, std::int64_t round) = 0;
  // Collective, once per unit after its last add(). Moves units before it one stage on and starts this one's way to
  // ShardedParameter::gradient. Communication that more depends on had the time since the last call to run, a unit's
  // last over a network the time of one call more (see lag()).
  void finish(ShardUnit& unit);
  void finish_all();  // collective; completes every unit given to finish()

 protected:
  GradientReducer(const ShardContext& context, GradientProbe probe);

  // A unit's way in finish(), in this order; each waits (merge) for what the one before has issued.
  // Sums over the shards, where add() has not. True when anything is under way.
  virtual bool start_over_shards(ShardUnit& unit) = 0;
  // Only where there are several. True: what is under way ends in ShardUnit's gradients (begin_all_reduce), and nothing is
  // kept of the unit. False: in what take_result() gives.
  virtual bool start_over_replicas(ShardUnit& unit) = 0;
  struct Result {
    Pieces own_part, spare;  // as ShardUnit::begin_gradients wants them
  };
  virtual Result take_result(ShardUnit& unit) = 0;  // nothing is kept of the unit

  virtual void merge_received(ShardUnit& unit) = 0;  // waits for what is under way, if anything, and adds it
  virtual void forget_sums() = 0;
  virtual void count_partials() = 0;  // to MemoryUse

  Pieces take_gradients(ShardUnit& unit);
  ReductionAxis over_shards(const ShardUnit& unit) const;
  ReductionAxis over_replicas(const ShardUnit& unit) const;
  const RoundSchedule& schedule() const;
  // To be called by an add() that is about to issue an exchange: waits for those of earlier calls (see lag()), and for
  // the unit's own, and counts this one as under way.
  void merge_earlier_adds(ShardUnit& unit);

  ShardContext context_;

 private:
  struct Finishing {
    ShardUnit* unit;
    int stage = 0;
    std::size_t num_calls = 0;  // of finish() since it came to this stage
  };
  // Runs the unit's stages until something is under way (true) or the unit has its gradient (false).
  bool advance(Finishing& finishing);
  bool is_last_wait(const Finishing& finishing) const;  // all of its communication has been issued
  // The group of a unit's last communication.
  const Communicator& last_group() const;
  void merge(ShardUnit& unit);

  GradientProbe probe_;
  std::optional<RoundSchedule> schedule_;
  std::deque<ShardUnit*> added_;     // whose exchanges add() has issued, while they are under way, by age
  std::deque<Finishing> finishing_;  // by age
};

std::unique_ptr<GradientReducer> make_gradient_reducer(ReductionOrder order, const ShardContext& context,
                                                       GradientProbe probe);

}  // namespace shardtune
