// The gradients of a ShardUnit: out of autograd into the packed layout, and back as shards.
#include <numeric>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

#include "core/error.hpp"
#include "distributed/parallel/shard_unit.hpp"

namespace shardtune {

at::Tensor ShardUnit::pack_gradients() {
  const at::NoGradGuard no_grad;
  at::Tensor packed = at::empty({std::accumulate(packed_counts_.begin(), packed_counts_.end(), std::int64_t{0})},
                                context_.reduce_dtype);
  std::vector<at::Tensor> gradients(parameters_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    at::Tensor& gradient = parameters_[i].parameter->value.mutable_grad();
    if (!gradient.defined()) continue;
    check_internal(gradient.scalar_type() == at::kFloat, "ShardUnit: a gradient is not fp32");
    gradients[i] = gradient.contiguous().view({-1});
    gradient.reset();
  }
  std::int64_t at_element = 0;
  for (int rank = 0; rank < context_.grid.world().size(); ++rank) {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const ShardedParameter& p = parameters_[i];
      const std::int64_t size = p.layout.size(rank);
      if (!p.parameter->is_trainable || size == 0) continue;
      at::Tensor part = packed.narrow(0, at_element, size);
      at_element += size;
      if (gradients[i].defined()) {
        part.copy_(gradients[i].narrow(0, p.layout.begin(rank), size));
      } else {
        part.zero_();
      }
    }
  }
  return packed;
}

void ShardUnit::drop_gradients() {
  for (ShardedParameter& p : parameters_) p.parameter->value.mutable_grad().reset();
}

void ShardUnit::begin_gradients(at::Tensor own_part) {
  release_gradients();
  const int num_replicas = context_.grid.num_replicas();
  own_gradients_ = std::move(own_part);
  if (num_replicas == 1) {
    packed_gradients_ = own_gradients_;
  } else {
    const auto first = packed_counts_.begin() + static_cast<std::ptrdiff_t>(context_.grid.shard()) * num_replicas;
    const std::vector<std::int64_t> counts(first, first + num_replicas);
    packed_gradients_ = at::empty({shard_counts_[static_cast<std::size_t>(context_.grid.shard())]}, at::kFloat);
    gradient_work_ = context_.grid.replicas().all_gather(packed_gradients_, own_gradients_, counts);
  }
  gradient_bytes_ = static_cast<std::int64_t>(packed_gradients_.nbytes());
  context_.memory.gradients.add(gradient_bytes_);
}

void ShardUnit::finish_gradients() {
  const at::NoGradGuard no_grad;
  gradient_work_.wait();
  own_gradients_.reset();
  // With one replica the packed layout is the parameters one after another: nothing to rearrange.
  const int num_replicas = context_.grid.num_replicas();
  const at::Tensor packed = std::exchange(packed_gradients_, at::Tensor());
  const at::Tensor flat = num_replicas == 1 ? packed : at::empty_like(packed);
  if (num_replicas > 1) context_.memory.gradients.add(gradient_bytes_);
  std::int64_t at_element = 0;
  for (ShardedParameter& p : parameters_) {
    if (!p.parameter->is_trainable) continue;
    p.gradient = flat.narrow(0, at_element, p.master.numel());
    at_element += p.master.numel();
  }
  if (num_replicas == 1) return;
  at_element = 0;
  const int first_rank = context_.grid.shard() * num_replicas;
  for (int rank = first_rank; rank < first_rank + num_replicas; ++rank) {
    for (ShardedParameter& p : parameters_) {
      const std::int64_t size = p.layout.size(rank);
      if (!p.parameter->is_trainable || size == 0) continue;
      p.gradient.narrow(0, p.layout.begin(rank) - p.master_offset, size).copy_(packed.narrow(0, at_element, size));
      at_element += size;
    }
  }
  context_.memory.gradients.subtract(gradient_bytes_);
}

void ShardUnit::release_gradients() {
  gradient_work_.wait();
  own_gradients_.reset();
  packed_gradients_.reset();
  for (ShardedParameter& p : parameters_) p.gradient.reset();
  context_.memory.gradients.subtract(std::exchange(gradient_bytes_, 0));
}

}  // namespace shardtune
