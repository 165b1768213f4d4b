#include "distributed/parallel/shard_unit.hpp"

#include <algorithm>
#include <cctype>
#include <numeric>
#include <string_view>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/native/Resize.h>
#include <ATen/ops/empty.h>
#include <fmt/format.h>
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

std::int64_t copy_bytes(const Parameter& parameter) {
  return parameter.numel() * static_cast<std::int64_t>(parameter.value.element_size());
}

// True when `word` stands at the end of a dotted name part: "word" or "word." follows.
bool ends_part(std::string_view name, std::string_view word, bool starts_part) {
  for (std::size_t at = name.find(word); at != std::string_view::npos; at = name.find(word, at + 1)) {
    const std::size_t after = at + word.size();
    const bool is_end = after == name.size() || name[after] == '.';
    const bool is_start = !starts_part || at == 0 || name[at - 1] == '.';
    if (is_end && is_start) return true;
  }
  return false;
}

}  // namespace

bool has_weight_decay(const Parameter& parameter) {
  if (parameter.is_norm) return false;
  std::string name = parameter.name;
  std::transform(name.begin(), name.end(), name.begin(), [](unsigned char c) { return std::tolower(c); });
  for (const char* word : {"bias", "layernorm", "rmsnorm"}) {
    if (name.find(word) != std::string::npos) return false;
  }
  return !ends_part(name, "norm", true) && !ends_part(name, "_norm", false);
}

ShardUnit::ShardUnit(Unit& unit, const ShardContext& context) : unit_(unit), context_(context) {
  const at::NoGradGuard no_grad;
  for (Parameter* parameter : unit.parameters) {
    check_internal(parameter != nullptr, "ShardUnit: null parameter");
    parameters_.emplace_back(*parameter, context.world.size(), context.world.rank());
    has_trainable_ = has_trainable_ || parameter->is_trainable;
    create_storage(parameters_.back());
  }
  packed_counts_ = counts_per_rank(true);
  is_unsharded_ = !frees_storage();
  if (is_unsharded_) context_.memory.compute.add(copy_bytes_);
}

void ShardUnit::create_storage(ShardedParameter& sharded) {
  Parameter& parameter = *sharded.parameter;
  const bool is_cut = frees_storage();
  sharded.master_offset = is_cut ? sharded.slice_offset() : 0;
  sharded.master = at::empty({is_cut ? sharded.slice_numel() : parameter.numel()}, at::kFloat);
  context_.memory.masters.add(static_cast<std::int64_t>(sharded.master.nbytes()));
  if (!is_cut && context_.compute_dtype == at::kFloat) {
    parameter.value = sharded.master.view(parameter.shape).variable_data();  // one copy serves both purposes
  } else {
    parameter.value = at::empty(parameter.shape, context_.compute_dtype);
    copy_bytes_ += copy_bytes(parameter);
    if (is_cut) resize_storage(parameter.value, 0);
  }
  parameter.value.set_requires_grad(parameter.is_trainable);
  if (parameter.is_trainable) parameter.value.set_grad_dtype(at::kFloat);
}

std::vector<std::int64_t> ShardUnit::counts_per_rank(bool trainable_only) const {
  std::vector<std::int64_t> counts(static_cast<std::size_t>(context_.world.size()));
  for (int rank = 0; rank < context_.world.size(); ++rank) {
    for (const ShardedParameter& p : parameters_) {
      if (p.parameter->is_trainable || !trainable_only) counts[static_cast<std::size_t>(rank)] += p.layout.size(rank);
    }
  }
  return counts;
}

at::Tensor ShardUnit::gather_slices(const at::Tensor& own, const std::vector<std::int64_t>& counts) {
  at::Tensor all = at::empty({sum(counts)}, own.options());
  context_.world.all_gather(all, own, counts).wait();
  return all;
}

void ShardUnit::unshard() {
  if (is_unsharded_) return;
  const at::NoGradGuard no_grad;
  const std::vector<std::int64_t> counts = counts_per_rank(false);
  const auto own_rank = static_cast<std::size_t>(context_.world.rank());
  at::Tensor own = at::empty({counts[own_rank]}, context_.compute_dtype);
  std::int64_t at_element = 0;
  for (const ShardedParameter& p : parameters_) {
    own.narrow(0, at_element, p.slice_numel()).copy_(p.master);
    at_element += p.slice_numel();
  }
  const at::Tensor all = gather_slices(own, counts);
  const auto buffers = static_cast<std::int64_t>(all.nbytes() + own.nbytes());
  own.reset();
  context_.memory.compute.add(copy_bytes_ + buffers);
  std::vector<at::Tensor> flat;
  for (const ShardedParameter& p : parameters_) {
    resize_storage(p.parameter->value, copy_bytes(*p.parameter));
    flat.push_back(raw_flat(p.parameter->value));
  }
  at_element = 0;
  for (int rank = 0; rank < context_.world.size(); ++rank) {
    for (std::size_t i = 0; i < parameters_.size(); ++i) {
      const BlockLayout& layout = parameters_[i].layout;
      const std::int64_t size = layout.size(rank);
      if (size > 0) flat[i].narrow(0, layout.begin(rank), size).copy_(all.narrow(0, at_element, size));
      at_element += size;
    }
  }
  context_.memory.compute.subtract(buffers);
  is_unsharded_ = true;
}

void ShardUnit::reshard() noexcept {
  if (!frees_storage() || !is_unsharded_) return;
  for (const ShardedParameter& p : parameters_) resize_storage(p.parameter->value, 0);
  context_.memory.compute.subtract(copy_bytes_);
  is_unsharded_ = false;
}

at::Tensor ShardUnit::pack_gradients() {
  const at::NoGradGuard no_grad;
  at::Tensor packed = at::empty({sum(packed_counts_)}, at::kFloat);
  std::vector<at::Tensor> gradients(parameters_.size());
  for (std::size_t i = 0; i < parameters_.size(); ++i) {
    at::Tensor& gradient = parameters_[i].parameter->value.mutable_grad();
    if (!gradient.defined()) continue;
    check_internal(gradient.scalar_type() == at::kFloat, "ShardUnit: a gradient is not fp32");
    gradients[i] = gradient.contiguous().view({-1});
    gradient.reset();
  }
  std::int64_t at_element = 0;
  for (int rank = 0; rank < context_.world.size(); ++rank) {
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

void ShardUnit::set_gradients(const at::Tensor& own_part) {
  const at::NoGradGuard no_grad;
  release_gradients();
  const bool is_cut = frees_storage();
  const int num_ranks = context_.world.size();
  // One rank's packed layout is the parameters one after another: nothing to gather or to rearrange.
  const bool is_whole = is_cut || num_ranks == 1;
  const at::Tensor packed = is_whole ? own_part : gather_slices(own_part, packed_counts_);
  const at::Tensor flat = is_whole ? own_part : at::empty({sum(packed_counts_)}, at::kFloat);
  std::int64_t at_element = 0;
  for (ShardedParameter& p : parameters_) {
    if (!p.parameter->is_trainable) continue;
    p.gradient = flat.narrow(0, at_element, p.master.numel());
    at_element += p.master.numel();
  }
  gradient_bytes_ = static_cast<std::int64_t>(flat.nbytes());
  context_.memory.gradients.add(gradient_bytes_);
  if (is_whole) return;
  const auto buffer = static_cast<std::int64_t>(packed.nbytes());
  context_.memory.gradients.add(buffer);
  at_element = 0;
  for (int rank = 0; rank < num_ranks; ++rank) {
    for (ShardedParameter& p : parameters_) {
      const std::int64_t size = p.layout.size(rank);
      if (!p.parameter->is_trainable || size == 0) continue;
      p.gradient.narrow(0, p.layout.begin(rank), size).copy_(packed.narrow(0, at_element, size));
      at_element += size;
    }
  }
  context_.memory.gradients.subtract(buffer);
}

void ShardUnit::release_gradients() {
  for (ShardedParameter& p : parameters_) p.gradient.reset();
  context_.memory.gradients.subtract(std::exchange(gradient_bytes_, 0));
}

void ShardUnit::gather_whole(const ShardedParameter& parameter, at::Tensor like_master) {
  if (frees_storage()) return;
  const at::NoGradGuard no_grad;
  std::vector<std::int64_t> counts;
  for (int rank = 0; rank < context_.world.size(); ++rank) counts.push_back(parameter.layout.size(rank));
  const at::Tensor own = parameter.slice_of(like_master).clone();
  context_.world.all_gather(std::move(like_master), own, counts).wait();
}

void ShardUnit::gather_masters() {
  // Parameter by parameter: a whole unit (an embedding, say) need not exist twice.
  for (const ShardedParameter& p : parameters_) gather_whole(p, p.master);
}

void ShardUnit::refresh_compute_copies() {
  if (frees_storage() || context_.compute_dtype == at::kFloat) return;
  const at::NoGradGuard no_grad;
  for (const ShardedParameter& p : parameters_) raw_flat(p.parameter->value).copy_(p.master);
}

}  // namespace shardtune
