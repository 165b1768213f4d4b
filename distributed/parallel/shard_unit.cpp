#include "distributed/parallel/shard_unit.hpp"

#include <numeric>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <torch/csrc/autograd/variable.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

std::int64_t sum(const std::vector<std::int64_t>& values) {
  return std::accumulate(values.begin(), values.end(), std::int64_t{0});
}

// A view for raw writes: it shares the storage but neither the version counter nor the graph.
at::Tensor raw_flat(const at::Tensor& tensor) { return tensor.variable_data().view({-1}); }

void resize_storage(const at::Tensor& tensor, std::int64_t bytes) {
  at::native::resize_bytes_cpu(tensor.storage().unsafeGetStorageImpl(), static_cast<std::size_t>(bytes));
}

// Communicators move no fp16; a gather only moves bits, so bf16 may stand for it.
at::Tensor as_wire(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kHalf ? tensor.view(at::kBFloat16) : tensor;
}

std::int64_t copy_bytes(const Parameter& parameter) {
  return parameter.numel() * static_cast<std::int64_t>(parameter.value.element_size());
}

}  // namespace

ShardUnit::ShardUnit(Unit& unit, const ShardContext& context) : unit_(unit), context_(context) {
  const at::NoGradGuard no_grad;
  for (Parameter* parameter : unit.parameters) {
    check_internal(parameter != nullptr, "ShardUnit: null parameter");
    parameters_.emplace_back(*parameter, context.grid);
    has_trainable_ = has_trainable_ || parameter->is_trainable;
    create_storage(parameters_.back());
  }
  shard_counts_ = counts_of_shards(true);
  for (int rank = 0; rank < context.grid.world().size(); ++rank) {
    std::int64_t count = 0;
    for (const ShardedParameter& p : parameters_) count += p.parameter->is_trainable ? p.layout.size(rank) : 0;
    packed_counts_.push_back(count);
  }
  is_unsharded_ = !frees_storage();
  if (is_unsharded_) context_.memory.compute.add(copy_bytes_);
}

void ShardUnit::create_storage(ShardedParameter& sharded) {
  Parameter& parameter = *sharded.parameter;
  const int shard = context_.grid.shard();
  sharded.master_offset = sharded.shard_begin(shard);
  const std::int64_t numel = sharded.shard_numel(shard);
  parameter.value = at::empty(parameter.shape, context_.compute_dtype);
  copy_bytes_ += copy_bytes(parameter);
  if (!frees_storage() && context_.compute_dtype == at::kFloat) {
    // One copy serves both purposes.
    sharded.master = raw_flat(parameter.value).narrow(0, sharded.master_offset, numel);
    copy_bytes_ -= static_cast<std::int64_t>(sharded.master.nbytes());
  } else {
    sharded.master = at::empty({numel}, at::kFloat);
    has_copies_ = true;
    if (frees_storage()) resize_storage(parameter.value, 0);
  }
  context_.memory.masters.add(static_cast<std::int64_t>(sharded.master.nbytes()));
  parameter.value.set_requires_grad(parameter.is_trainable);
  if (parameter.is_trainable) parameter.value.set_grad_dtype(at::kFloat);
}

std::vector<std::int64_t> ShardUnit::counts_of_shards(bool trainable_only) const {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(context_.grid.num_shards()));
  for (int shard = 0; shard < context_.grid.num_shards(); ++shard) {
    for (const ShardedParameter& p : parameters_) {
      if (p.parameter->is_trainable || !trainable_only) counts[static_cast<std::size_t>(shard)] += p.shard_numel(shard);
    }
  }
  return counts;
}

void ShardUnit::begin_gather(bool trainable_only) {
  const at::NoGradGuard no_grad;
  const std::vector<std::int64_t> counts = counts_of_shards(trainable_only);
  Gather gather{.trainable_only = trainable_only,
                .own = at::empty({counts[static_cast<std::size_t>(context_.grid.shard())]}, context_.compute_dtype),
                .all = {}};
  std::int64_t at_element = 0;
  for (const ShardedParameter& p : parameters_) {
    if (trainable_only && !p.parameter->is_trainable) continue;
    gather.own.narrow(0, at_element, p.master.numel()).copy_(p.master);
    at_element += p.master.numel();
  }
  if (context_.grid.num_shards() == 1) {
    gather.all = gather.own;
  } else {
    gather.all = at::empty({sum(counts)}, context_.compute_dtype);
    gather.work = context_.grid.shards().all_gather(as_wire(gather.all), as_wire(gather.own), counts);
  }
  context_.memory.compute.add(static_cast<std::int64_t>(gather.all.nbytes()));
  gather_ = std::move(gather);
}

void ShardUnit::finish_gather() {
  const at::NoGradGuard no_grad;
  gather_->work.wait();
  gather_->own.reset();
  unpack(*gather_);
  drop_gather();
}

void ShardUnit::unpack(const Gather& gather) {
  std::vector<at::Tensor> flat;
  for (const ShardedParameter& p : parameters_) flat.push_back(raw_flat(p.parameter->value));
  std::int64_t at_element = 0;
  for (int shard = 0; shard < context_.grid.num_shards(); ++shard) {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const ShardedParameter& p = parameters_[i];
      const std::int64_t size = p.shard_numel(shard);
      if (size == 0 || (gather.trainable_only && !p.parameter->is_trainable)) continue;
      // Where a master is a part of its compute copy, it is there already (and a background save may be reading it).
      const bool is_there = shard == context_.grid.shard() && p.master.is_alias_of(p.parameter->value);
      if (!is_there) flat[i].narrow(0, p.shard_begin(shard), size).copy_(gather.all.narrow(0, at_element, size));
      at_element += size;
    }
  }
}

void ShardUnit::drop_gather() {
  if (!gather_) return;
  gather_->work.wait();
  context_.memory.compute.subtract(static_cast<std::int64_t>(gather_->all.nbytes()));
  gather_.reset();
}

void ShardUnit::begin_unshard() {
  if (!is_unsharded_ && !gather_) begin_gather(/*trainable_only=*/!frees_storage());
}

void ShardUnit::unshard() {
  if (is_unsharded_) return;
  begin_unshard();
  gather_->work.wait();  // before memory is taken for the result
  if (frees_storage()) {
    for (const ShardedParameter& p : parameters_) resize_storage(p.parameter->value, copy_bytes(*p.parameter));
    context_.memory.compute.add(copy_bytes_);
  }
  is_unsharded_ = true;
  finish_gather();
}

void ShardUnit::reshard() noexcept {
  if (!frees_storage() || !is_unsharded_) return;
  for (const ShardedParameter& p : parameters_) resize_storage(p.parameter->value, 0);
  context_.memory.compute.subtract(copy_bytes_);
  is_unsharded_ = false;
}

void ShardUnit::begin_refresh() {
  if (frees_storage()) return;
  if (context_.grid.num_shards() > 1) return begin_gather(/*trainable_only=*/false);
  copy_masters(/*trainable_only=*/false);
}

void ShardUnit::finish_refresh() {
  if (frees_storage() || !gather_) return;
  finish_gather();
  is_unsharded_ = true;
}

void ShardUnit::masters_changed() {
  if (frees_storage() || !has_trainable_) return;
  if (context_.grid.num_shards() > 1) {
    is_unsharded_ = false;
  } else {
    copy_masters(/*trainable_only=*/true);
  }
}

void ShardUnit::copy_masters(bool trainable_only) {
  if (!has_copies_) return;
  const at::NoGradGuard no_grad;
  for (const ShardedParameter& p : parameters_) {
    if (p.parameter->is_trainable || !trainable_only) raw_flat(p.parameter->value).copy_(p.master);
  }
}

void ShardUnit::gather_replicas(const ShardedParameter& parameter, at::Tensor like_master) {
  const int num_replicas = context_.grid.num_replicas();
  if (num_replicas == 1) return;
  const at::NoGradGuard no_grad;
  std::vector<std::int64_t> counts;
  for (int replica = 0; replica < num_replicas; ++replica) {
    counts.push_back(parameter.layout.size(context_.grid.shard() * num_replicas + replica));
  }
  const at::Tensor own = parameter.slice_of(like_master).clone();
  context_.grid.replicas().all_gather(std::move(like_master), own, counts).wait();
}

void ShardUnit::drop_frozen_masters() {
  const at::NoGradGuard no_grad;
  for (ShardedParameter& p : parameters_) {
    if (p.parameter->is_trainable || p.master.scalar_type() == context_.compute_dtype) continue;
    at::Tensor rounded = p.master.to(context_.compute_dtype);
    if (!at::equal(rounded.to(at::kFloat), p.master)) continue;
    context_.memory.masters.subtract(static_cast<std::int64_t>(p.master.nbytes()));
    if (frees_storage()) {
      p.master = std::move(rounded);
      context_.memory.masters.add(static_cast<std::int64_t>(p.master.nbytes()));
    } else {
      p.master = raw_flat(p.parameter->value).narrow(0, p.master_offset, p.master.numel());
    }
  }
}

void ShardUnit::gather_masters() {
  // Parameter by parameter: a whole unit (an embedding, say) need not exist twice.
  for (const ShardedParameter& p : parameters_) {
    if (p.master.scalar_type() == at::kFloat) gather_replicas(p, p.master);
  }
}

}  // namespace shardtune
