#pragma once
// A unit of the model with the storage of its parameters: the grain of one gather and one reduction.
//
// Note [Why storage is emptied, not swapped]
// Autograd's saved tensors are views of a parameter's storage (a transposed weight, say). Freeing by emptying the
// storage (its memory is given back, or it points to nothing any more) and filling the same storage again keeps them
// valid between forward and backward, wherever its memory then lies. The data is written through variable_data(), whose
// version counter is its own: param.copy_() would count as an in-place change of a saved tensor.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/engine_buffers.hpp"
#include "distributed/parallel/memory_use.hpp"
#include "distributed/parallel/packed_pieces.hpp"
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
  EngineBuffers& buffers;
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
  ~ShardUnit();

  Unit& unit() const noexcept { return unit_; }
  std::vector<ShardedParameter>& parameters() noexcept { return parameters_; }
  const std::vector<ShardedParameter>& parameters() const noexcept { return parameters_; }
  bool has_trainable() const noexcept { return has_trainable_; }
  std::int64_t shared_copy_bytes() const noexcept;  // what gathering through EngineBuffers::copies takes

  // Fills the compute copies where the plan frees them or they are out of date: every rank casts its shards into a copy
  // that the ranks have in common (EngineBuffers::copies), or, where there is none, an all_gather over the shards.
  // Collective unless the unit is unsharded already. begin_unshard() is optional and may be repeated.
  void begin_unshard();
  void unshard();
  bool is_unsharded() const noexcept { return is_unsharded_; }
  // Frees the compute copies where the plan does. Local, idempotent.
  void reshard() noexcept;
  // Waits for a gather that was begun and nobody wanted, and drops it. Local.
  void drop_gather();

  // Takes .grad of every trainable parameter away, flat, in order. A missing gradient counts as zero. Local.
  Pieces take_gradients();
  void drop_gradients();
  // Views of what belongs to each shard in such gradients: the packed layout.
  std::vector<Pieces> slices_of_shards(const Pieces& gradients) const;
  // Views of what belongs to each replica of this shard: in such gradients where there is one shard, else in one tensor,
  // this shard's part of the packed layout.
  std::vector<Pieces> slices_of_replicas(const Pieces& sum) const;
  // Elements of the packed layout that belong to each shard, and to each replica of this one.
  const std::vector<std::int64_t>& shard_counts() const noexcept { return shard_counts_; }
  const std::vector<std::int64_t>& replica_counts() const noexcept { return replica_counts_; }
  // Sets ShardedParameter::gradient: from whole gradients, one tensor per trainable parameter, where there is one rank;
  // else from one tensor, this rank's part of the packed layout, completed by an all_gather over the replicas.
  // Collective where there are several. `spare`: whole gradients that may be overwritten with the result, or none.
  void begin_gradients(Pieces own_part, Pieces spare);
  // The same where an all_reduce in `dtype` over the replicas (several) gives the result. sum: of this replica, whole
  // gradients where there is one shard, which become the result; else one tensor, this shard's part of the packed
  // layout; or nothing, which counts as zero. Collective.
  void begin_all_reduce(Pieces sum, at::ScalarType dtype);
  void finish_gradients();
  void release_gradients();

  // Collective over the replicas: every rank contributes its distinct slices, afterwards its masters are complete.
  void gather_masters();
  // The same for one tensor that is cut like a master of this unit.
  void gather_replicas(const ShardedParameter& parameter, at::Tensor like_master);
  // Frozen parameters whose values fit into the compute dtype: that shard instead of the fp32 one, and none but the
  // compute copy where that is kept whole. Local.
  void drop_frozen_masters();
  // Plans that keep compute copies whole: those of frozen parameters become one for all ranks of `node`, where the
  // backend has memory in common; false on all of them where it has not. Collective over the node, once, after
  // drop_frozen_masters().
  bool share_frozen(Communicator& node);
  // Compute copies that the plan keeps := masters. Collective where masters are cut.
  void begin_refresh();
  void finish_refresh();
  // The masters of the trainable parameters have changed. Local: where masters are cut, the other ranks' parts of the
  // compute copies that the plan keeps are out of date until the next unshard().
  void masters_changed();

 private:
  struct Gather {  // through a copy, or through buckets
    bool trainable_only;
    std::optional<std::size_t> copy = {};
    std::int64_t filling = 0;
    std::unique_ptr<BucketStream> stream = {};
  };
  bool frees_storage() const noexcept { return context_.plan.reshard_after_backward; }
  void create_storage(ShardedParameter& parameter);
  std::vector<std::int64_t> counts_of_shards(bool trainable_only) const;
  void begin_gather(bool trainable_only);
  std::unique_ptr<BucketStream> gather_stream(bool trainable_only);
  std::vector<Pieces> weights_of_shards(bool trainable_only) const;  // views of the compute copies
  void finish_gather();
  std::vector<Pieces> slices_of_ranks(const Pieces& gradients) const;  // as slices_of_shards, of RankGrid::world()
  void create_gradients(const at::Tensor& packed);  // undefined: uninitialised memory
  void count_gradients();
  std::vector<Pieces> gradients_of_replicas() const;  // views of gradients_: this shard's part of the packed layout
  std::unique_ptr<BucketStream> gradient_stream(Pieces own_part);
  void fill_copy(std::size_t copy);
  void use_copy(std::size_t copy);

  Unit& unit_;
  ShardContext context_;
  std::vector<ShardedParameter> parameters_;
  std::vector<std::int64_t> shard_counts_;
  std::vector<std::int64_t> replica_counts_;
  std::optional<Gather> gather_;     // in flight
  std::optional<std::size_t> copy_;  // where the weights lie while unsharded, if in one of EngineBuffers::copies
  // From begin_gradients() to finish_gradients():
  Pieces gradients_;
  std::unique_ptr<BucketStream> gradient_stream_;
  at::Tensor shared_frozen_;  // bytes, see share_frozen()
  bool has_trainable_ = false;
  bool is_unsharded_ = false;
  std::int64_t copy_bytes_ = 0;      // of the compute copies while they exist in memory of this rank alone
  std::int64_t gradient_bytes_ = 0;  // held through set_gradients
};

}  // namespace shardtune
