#pragma once
// A unit of the model with the storage of its parameters: the grain of one gather and one reduction.
//
// Note [Why storage is resized, not swapped]
// Autograd's saved tensors are views of a parameter's storage (a transposed weight, say). Freeing by resizing the
// storage to 0 bytes and refilling the same storage keeps them valid between forward and backward. The data is written
// through variable_data(), whose version counter is its own: param.copy_() would count as an in-place change of a saved
// tensor.
#include <cstdint>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/memory_use.hpp"
#include "distributed/parallel/rank_grid.hpp"
#include "distributed/parallel/sharded_parameter.hpp"
#include "distributed/parallel/sharding_plan.hpp"
#include "models/unit.hpp"

namespace shardtune {

// What all units of an engine share; everything referenced outlives the units.
struct ShardContext {
  const RankGrid& grid;
  const ShardingPlan& plan;
  at::ScalarType compute_dtype;
  at::ScalarType reduce_dtype;
  MemoryUse& memory;
};

// Not thread-safe; belongs to the thread of its rank. Collective calls come in pairs where communication is worth
// hiding: the first issues it, the second waits for the result, and other work may be done in between.
class ShardUnit {
 public:
  // Local. Creates the masters (contents undefined) and sets every Parameter::value to an autograd leaf of the compute
  // dtype whose storage starts on a 64-byte boundary (fp32 gradients also for 16-bit leaves). `unit` outlives this.
  ShardUnit(Unit& unit, const ShardContext& context);
  ShardUnit(const ShardUnit&) = delete;
  ShardUnit& operator=(const ShardUnit&) = delete;

  Unit& unit() const noexcept { return unit_; }
  std::vector<ShardedParameter>& parameters() noexcept { return parameters_; }
  const std::vector<ShardedParameter>& parameters() const noexcept { return parameters_; }
  bool has_trainable() const noexcept { return has_trainable_; }

  // Fills the compute copies where the plan frees them or they are out of date: one all_gather over the shards.
  // Collective unless the unit is unsharded already. begin_unshard() is optional and may be repeated.
  void begin_unshard();
  void unshard();
  bool is_unsharded() const noexcept { return is_unsharded_; }
  // Frees the compute copies where the plan does. Local, idempotent.
  void reshard() noexcept;
  // Waits for a gather that was begun and nobody wanted, and drops it. Local.
  void drop_gather();

  // Takes .grad of every trainable parameter away and returns them as one tensor of the reduce dtype in packed layout:
  // for each rank of RankGrid::world(), for each trainable parameter, that rank's slice. A missing gradient counts as
  // zero. Local.
  at::Tensor pack_gradients();
  void drop_gradients();
  // Elements of the packed layout that belong to each rank, and to each shard.
  const std::vector<std::int64_t>& packed_counts() const noexcept { return packed_counts_; }
  const std::vector<std::int64_t>& shard_counts() const noexcept { return shard_counts_; }
  // Sets ShardedParameter::gradient from this rank's part of a finished packed gradient: one all_gather over the
  // replicas. Collective where there are several.
  void begin_gradients(at::Tensor own_part);
  void finish_gradients();
  void release_gradients();

  // Collective over the replicas: every rank contributes its distinct slices, afterwards its masters are complete.
  void gather_masters();
  // The same for one tensor that is cut like a master of this unit.
  void gather_replicas(const ShardedParameter& parameter, at::Tensor like_master);
  // Frozen parameters whose values fit into the compute dtype: that shard instead of the fp32 one, and none but the
  // compute copy where that is kept whole. Local.
  void drop_frozen_masters();
  // Compute copies that the plan keeps := masters. Collective where masters are cut.
  void begin_refresh();
  void finish_refresh();
  // The masters of the trainable parameters have changed. Local: where masters are cut, the compute copies that the
  // plan keeps are out of date until the next unshard().
  void masters_changed();

 private:
  struct Gather {
    bool trainable_only = false;
    at::Tensor own;  // this rank's shards, 1-d, compute dtype
    at::Tensor all;  // of every shard in order
    Work work = {};
  };
  bool frees_storage() const noexcept { return context_.plan.reshard_after_backward; }
  void create_storage(ShardedParameter& parameter);
  std::vector<std::int64_t> counts_of_shards(bool trainable_only) const;
  void begin_gather(bool trainable_only);
  void finish_gather();
  void unpack(const Gather& gather);
  void copy_masters(bool trainable_only);  // to compute copies; masters are whole

  Unit& unit_;
  ShardContext context_;
  std::vector<ShardedParameter> parameters_;
  std::vector<std::int64_t> packed_counts_;
  std::vector<std::int64_t> shard_counts_;
  std::optional<Gather> gather_;  // in flight
  at::Tensor own_gradients_;      // in flight from begin_gradients() to finish_gradients()
  at::Tensor packed_gradients_;
  Work gradient_work_;
  bool has_trainable_ = false;
  bool has_copies_ = false;  // some compute copy is not its master
  bool is_unsharded_ = false;
  std::int64_t copy_bytes_ = 0;      // of the compute copies while they exist
  std::int64_t gradient_bytes_ = 0;  // held through set_gradients
};

}  // namespace shardtune
