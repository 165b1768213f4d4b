#pragma once
// A unit of the model with the storage of its parameters: the grain of one gather and one reduction.
//
// Note [Why storage is resized, not swapped]
// Autograd's saved tensors are views of a parameter's storage (a transposed weight, say). Freeing by resizing the
// storage to 0 bytes and refilling the same storage keeps them valid between forward and backward. The data is written
// through variable_data(), whose version counter is its own: param.copy_() would count as an in-place change of a saved
// tensor.
#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "distributed/comm/communicator.hpp"
#include "distributed/parallel/memory_use.hpp"
#include "distributed/parallel/sharded_parameter.hpp"
#include "distributed/parallel/sharding_plan.hpp"
#include "models/unit.hpp"

namespace shardtune {

// What all units of an engine share; everything referenced outlives the units.
struct ShardContext {
  Communicator& world;
  const ShardingPlan& plan;
  at::ScalarType compute_dtype;
  MemoryUse& memory;
};

// Not thread-safe; belongs to the thread of its rank.
class ShardUnit {
 public:
  // Local. Creates the masters (contents undefined) and sets every Parameter::value to an autograd leaf of the compute
  // dtype whose storage starts on a 64-byte boundary (fp32 gradients also for bf16 leaves). `unit` outlives this.
  ShardUnit(Unit& unit, const ShardContext& context);
  ShardUnit(const ShardUnit&) = delete;
  ShardUnit& operator=(const ShardUnit&) = delete;

  Unit& unit() const noexcept { return unit_; }
  std::vector<ShardedParameter>& parameters() noexcept { return parameters_; }
  const std::vector<ShardedParameter>& parameters() const noexcept { return parameters_; }
  bool has_trainable() const noexcept { return has_trainable_; }

  // Fills the compute copies. zero3: collective (one all_gather) unless already unsharded. ddp: nothing to do.
  void unshard();
  // Frees the compute copies (zero3). Local, idempotent.
  void reshard() noexcept;
  bool is_unsharded() const noexcept { return is_unsharded_; }

  // Takes .grad of every trainable parameter away and returns them as one fp32 tensor in packed layout: for each owner
  // rank, for each trainable parameter, that rank's slice. A missing gradient counts as zero. Local.
  at::Tensor pack_gradients();
  void drop_gradients();
  // Elements of the packed layout that belong to each rank.
  const std::vector<std::int64_t>& packed_counts() const noexcept { return packed_counts_; }
  // Sets ShardedParameter::gradient from this rank's part of a finished packed gradient.
  // zero3: views of it. ddp: collective (one all_gather), then the whole tensors.
  void set_gradients(const at::Tensor& own_part);
  void release_gradients();

  // ddp: collective; every rank contributes its distinct slices, afterwards all masters are whole. zero3: nothing.
  void gather_masters();
  // The same for one tensor that is cut like a master of this unit.
  void gather_whole(const ShardedParameter& parameter, at::Tensor like_master);
  // ddp in bf16: compute copies := masters. Otherwise nothing. Local.
  void refresh_compute_copies();

 private:
  bool frees_storage() const noexcept { return context_.plan.reshard_after_forward; }
  void create_storage(ShardedParameter& parameter);
  std::vector<std::int64_t> counts_per_rank(bool trainable_only) const;
  // all_gather of every rank's distinct slices (1-d `own`, packed by parameter) to the packed layout.
  at::Tensor gather_slices(const at::Tensor& own, const std::vector<std::int64_t>& counts);

  Unit& unit_;
  ShardContext context_;
  std::vector<ShardedParameter> parameters_;
  std::vector<std::int64_t> packed_counts_;
  bool has_trainable_ = false;
  bool is_unsharded_ = false;
  std::int64_t copy_bytes_ = 0;      // of the compute copies while they exist
  std::int64_t gradient_bytes_ = 0;  // held through set_gradients
};

// Keeps a unit unsharded for a scope and reshards on the way out, also when its forward throws.
class UnshardedScope {
 public:
  explicit UnshardedScope(ShardUnit& unit) : unit_(unit) { unit_.unshard(); }
  ~UnshardedScope() { unit_.reshard(); }
  UnshardedScope(const UnshardedScope&) = delete;
  UnshardedScope& operator=(const UnshardedScope&) = delete;

 private:
  ShardUnit& unit_;
};

}  // namespace shardtune
