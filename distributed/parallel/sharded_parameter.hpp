#pragma once
// One weight tensor as a rank holds it. What optimizer, weight loading and checkpoint see of the parallel engine.
#include <cstdint>
#include <string>

#include <ATen/core/Tensor.h>

#include "distributed/parallel/block_layout.hpp"
#include "distributed/parallel/rank_grid.hpp"
#include "models/unit.hpp"

namespace shardtune {

struct ShardedParameter {
  ShardedParameter(Parameter& source, const RankGrid& grid)
      : parameter(&source),
        layout(source.numel(), grid.world().size()),
        rank(grid.world().rank()),
        num_replicas(grid.num_replicas()) {}

  Parameter* parameter;  // not owned: name, shape, is_norm, is_trainable, value
  BlockLayout layout;    // over the ranks of RankGrid::world(), the same for every plan
  int rank;              // there
  int num_replicas;
  // 1-d, contiguous: this rank's shard, which is the whole parameter under ddp and may be empty otherwise. fp32, except
  // that frozen parameters whose values fit into the compute dtype have no fp32 master once they are loaded.
  at::Tensor master;
  std::int64_t master_offset = 0;  // first element of `master` in the flat parameter
  // The same elements of the compute copy, in its dtype, where the plan keeps one beside the master (ddp, zero1, zero2 in
  // bf16 and fp16); else undefined. Whoever changes the master of a trainable parameter writes its rounded values here
  // too, before ParallelEngine::after_optimizer_step().
  at::Tensor compute_copy;
  // Cut like `master`, fp32. Defined between ParallelEngine::finish_step() and after_optimizer_step(), trainable only.
  at::Tensor gradient;

  // Where a shard begins in the flat parameter, and its size: the slices of its replicas.
  std::int64_t shard_begin(int shard) const noexcept { return layout.begin(shard * num_replicas); }
  std::int64_t shard_numel(int shard) const noexcept { return shard_begin(shard + 1) - shard_begin(shard); }

  // The distinct slice of this rank: over all ranks these cover the flat parameter exactly once, under every plan.
  std::int64_t slice_offset() const noexcept { return layout.begin(rank); }
  std::int64_t slice_numel() const noexcept { return layout.size(rank); }
  // View of the distinct slice in a tensor that is cut like `master` (master, gradient, exp_avg, exp_avg_sq).
  at::Tensor slice_of(const at::Tensor& like_master) const {
    return like_master.narrow(0, slice_offset() - master_offset, slice_numel());
  }
};

// Hugging Face's rule for its two optimizer groups (Trainer.get_decay_parameter_names of transformers 5): no weight
// decay for parameters of normalisation layers and for names that match
// bias | layernorm | rmsnorm | (^|.)norm($|.) | _norm($|.), whatever the case.
bool has_weight_decay(const Parameter& parameter);

}  // namespace shardtune
