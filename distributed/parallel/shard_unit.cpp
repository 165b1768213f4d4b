#include "distributed/parallel/shard_unit.hpp"

#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/equal.h>
#include <torch/csrc/autograd/variable.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

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

// Kernels expect weights on 64-byte boundaries.
std::int64_t place_bytes(const Parameter& parameter) { return (copy_bytes(parameter) + 63) / 64 * 64; }

// Memory that belongs to somebody else, or none. See Note [Why storage is emptied, not swapped].
void point_storage(const at::Tensor& tensor, void* data, std::int64_t bytes) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  storage->set_data_ptr_noswap({data, at::Device(at::kCPU)});
  storage->set_nbytes(static_cast<std::size_t>(bytes));
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
  for (int replica = 0; replica < context.grid.num_replicas(); ++replica) {
    const int rank = context.grid.shard() * context.grid.num_replicas() + replica;
    std::int64_t count = 0;
    for (const ShardedParameter& p : parameters_) count += p.parameter->is_trainable ? p.layout.size(rank) : 0;
    replica_counts_.push_back(count);
  }
  is_unsharded_ = !frees_storage();
  if (is_unsharded_) context_.memory.compute.add(copy_bytes_);
}

// Parameters outlive the unit, the memory that they point to does not.
ShardUnit::~ShardUnit() {
  if (copy_) reshard();
  for (const ShardedParameter& p : parameters_) {
    if (shared_frozen_.defined() && !p.parameter->is_trainable) point_storage(p.parameter->value, nullptr, 0);
  }
}

std::int64_t ShardUnit::shared_copy_bytes() const noexcept {
  std::int64_t bytes = 0;
  for (const ShardedParameter& p : parameters_) bytes += place_bytes(*p.parameter);
  return bytes;
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
    if (frees_storage()) {
      resize_storage(parameter.value, 0);
    } else {
      sharded.compute_copy = raw_flat(parameter.value).narrow(0, sharded.master_offset, numel);
    }
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
  Gather gather{.trainable_only = trainable_only};
  EngineBuffers& buffers = context_.buffers;
  if (frees_storage() && buffers.has_copies) {
    gather.copy = buffers.copies.take(unit_.is_root ? buffers.root_class : buffers.unit_class);
    fill_copy(*gather.copy);
    gather.filling = buffers.copies.fill_done();
  } else {
    gather.stream = gather_stream(trainable_only);
    gather.stream->start_some();
  }
  gather_ = std::move(gather);
}

// This rank's shards, straight out of the masters.
void ShardUnit::fill_copy(std::size_t copy) {
  std::int64_t at_byte = 0;
  for (const ShardedParameter& p : parameters_) {
    const at::Tensor bytes = context_.buffers.copies.memory(copy).narrow(0, at_byte, copy_bytes(*p.parameter));
    bytes.view(context_.compute_dtype).narrow(0, p.master_offset, p.master.numel()).copy_(p.master);
    at_byte += place_bytes(*p.parameter);
  }
}

void ShardUnit::use_copy(std::size_t copy) {
  auto* data = static_cast<std::byte*>(context_.buffers.copies.memory(copy).data_ptr());
  for (const ShardedParameter& p : parameters_) {
    point_storage(p.parameter->value, data, copy_bytes(*p.parameter));
    data += place_bytes(*p.parameter);
  }
  copy_ = copy;
}

std::vector<Pieces> ShardUnit::weights_of_shards(bool trainable_only) const {
  std::vector<Pieces> weights(static_cast<std::size_t>(context_.grid.num_shards()));
  for (const ShardedParameter& p : parameters_) {
    if (trainable_only && !p.parameter->is_trainable) continue;
    const at::Tensor flat = raw_flat(p.parameter->value);
    for (int shard = 0; shard < context_.grid.num_shards(); ++shard) {
      weights[static_cast<std::size_t>(shard)].push_back(flat.narrow(0, p.shard_begin(shard), p.shard_numel(shard)));
    }
  }
  return weights;
}

std::unique_ptr<BucketStream> ShardUnit::gather_stream(bool trainable_only) {
  Communicator& shards = context_.grid.shards();
  const auto own = static_cast<std::size_t>(shards.rank());
  const std::int64_t per_rank = context_.buffers.shards.numel_per_rank(context_.compute_dtype);
  Pieces own_weights;
  for (const ShardedParameter& p : parameters_) {
    if (p.parameter->is_trainable || !trainable_only)
      own_weights.push_back(p.compute_copy.defined() ? p.compute_copy : p.master);
  }
  const std::vector<std::int64_t> counts = counts_of_shards(trainable_only);
  BucketStream::Steps steps;
  steps.start = [=, &shards, dtype = context_.compute_dtype](std::int64_t chunk, const at::Tensor& bucket) {
    const std::vector<std::int64_t> in_chunk = counts_of_chunk(counts, chunk, per_rank);
    const Pieces places = split_bucket(bucket.view(dtype), in_chunk);
    copy_out(own_weights, chunk * per_rank, places[own]);
    const at::Tensor all = bucket.view(dtype).narrow(0, 0, num_elements(places));
    return shards.all_gather(as_wire(all), as_wire(places[own]), in_chunk);
  };
  // The weights' storage may not exist before the first chunk has arrived.
  auto weights = std::make_shared<std::vector<Pieces>>();
  steps.finish = [=, this](std::int64_t chunk, const at::Tensor& bucket) {
    if (weights->empty()) *weights = weights_of_shards(trainable_only);
    const Pieces places = split_bucket(bucket.view(context_.compute_dtype), counts_of_chunk(counts, chunk, per_rank));
    for (std::size_t shard = 0; shard < places.size(); ++shard) {
      if (shard != own) copy_in((*weights)[shard], chunk * per_rank, places[shard]);
    }
  };
  return std::make_unique<BucketStream>(context_.buffers.shards, num_chunks(counts, per_rank), std::move(steps));
}

void ShardUnit::finish_gather() {
  const at::NoGradGuard no_grad;
  gather_->stream->finish();
  for (const ShardedParameter& p : parameters_) {
    if (gather_->trainable_only && !p.parameter->is_trainable) continue;
    // Where a master is a part of its compute copy, it is there already (and a background save may be reading it).
    if (p.compute_copy.defined() || p.master.is_alias_of(p.parameter->value)) continue;
    raw_flat(p.parameter->value).narrow(0, p.master_offset, p.master.numel()).copy_(p.master);
  }
  gather_.reset();
}

void ShardUnit::drop_gather() {
  if (!gather_) return;
  if (gather_->copy) {
    context_.buffers.copies.wait_until_filled(gather_->filling);
    context_.buffers.copies.release(*gather_->copy);
  }
  gather_.reset();
}

void ShardUnit::begin_unshard() {
  if (!is_unsharded_ && !gather_) begin_gather(/*trainable_only=*/!frees_storage());
}

void ShardUnit::unshard() {
  if (is_unsharded_) return;
  begin_unshard();
  if (gather_->copy) {
    context_.buffers.copies.wait_until_filled(gather_->filling);
    use_copy(*gather_->copy);
    gather_.reset();
  } else {
    if (frees_storage()) {
      for (const ShardedParameter& p : parameters_) resize_storage(p.parameter->value, copy_bytes(*p.parameter));
      context_.memory.compute.add(copy_bytes_);
    }
    finish_gather();
  }
  is_unsharded_ = true;
}

void ShardUnit::reshard() noexcept {
  if (!frees_storage() || !is_unsharded_) return;
  is_unsharded_ = false;
  if (copy_) {
    for (const ShardedParameter& p : parameters_) point_storage(p.parameter->value, nullptr, 0);
    context_.buffers.copies.release(*std::exchange(copy_, std::nullopt));
    return;
  }
  for (const ShardedParameter& p : parameters_) resize_storage(p.parameter->value, 0);
  context_.memory.compute.subtract(copy_bytes_);
}

void ShardUnit::begin_refresh() {
  if (frees_storage()) return;
  const at::NoGradGuard no_grad;
  for (const ShardedParameter& p : parameters_) {
    if (p.compute_copy.defined()) p.compute_copy.copy_(p.master);
  }
  if (context_.grid.num_shards() > 1) begin_gather(/*trainable_only=*/false);
}

void ShardUnit::finish_refresh() {
  if (frees_storage() || !gather_) return;
  finish_gather();
  is_unsharded_ = true;
}

void ShardUnit::masters_changed() {
  if (!frees_storage() && has_trainable_ && context_.grid.num_shards() > 1) is_unsharded_ = false;
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
      p.master = std::exchange(p.compute_copy, {});
    }
  }
}

bool ShardUnit::share_frozen(Communicator& node) {
  check_internal(!frees_storage(), "ShardUnit: only weights that are kept whole can be shared");
  const at::NoGradGuard no_grad;
  std::int64_t num_bytes = 0;
  for (const ShardedParameter& p : parameters_) num_bytes += p.parameter->is_trainable ? 0 : place_bytes(*p.parameter);
  if (num_bytes == 0) return true;
  shared_frozen_ = node.make_shared(num_bytes, at::kByte);
  if (!shared_frozen_.defined()) return false;
  MemoryUse& memory = context_.memory;
  memory.buffers.add(num_bytes / node.size());
  std::int64_t at_byte = 0;
  for (const ShardedParameter& p : parameters_) {
    if (p.parameter->is_trainable) continue;
    const at::Tensor& value = p.parameter->value;
    const at::Tensor place = shared_frozen_.narrow(0, at_byte, copy_bytes(*p.parameter));
    at_byte += place_bytes(*p.parameter);
    if (node.rank() == 0) place.view(context_.compute_dtype).copy_(raw_flat(value));
    const bool is_fp32 = context_.compute_dtype == at::kFloat;
    const std::int64_t in_master = is_fp32 ? static_cast<std::int64_t>(p.master.nbytes()) : 0;
    memory.masters.subtract(in_master);
    memory.compute.subtract(copy_bytes(*p.parameter) - in_master);
    // Masters that are a part of the compute copy go with it: they have the same storage.
    point_storage(value, place.data_ptr(), copy_bytes(*p.parameter));
  }
  node.barrier();
  return true;
}

void ShardUnit::gather_masters() {
  // Parameter by parameter: a whole unit (an embedding, say) need not exist twice.
  for (const ShardedParameter& p : parameters_) {
    if (p.master.scalar_type() == at::kFloat) gather_replicas(p, p.master);
  }
}

}  // namespace shardtune
