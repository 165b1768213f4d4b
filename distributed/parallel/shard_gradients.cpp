// The gradients of a ShardUnit: out of autograd into pieces for the ranks, and back as shards.
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include "core/error.hpp"
#include "distributed/parallel/shard_unit.hpp"

namespace shardtune {

Pieces ShardUnit::take_gradients() {
  const at::NoGradGuard no_grad;
  Pieces gradients;
  for (const ShardedParameter& p : parameters_) {
    if (!p.parameter->is_trainable) continue;
    at::Tensor gradient = std::exchange(p.parameter->value.mutable_grad(), at::Tensor());
    if (!gradient.defined()) gradient = at::zeros({p.parameter->numel()}, at::kFloat);
    check_internal(gradient.scalar_type() == at::kFloat, "ShardUnit: a gradient is not fp32");
    gradients.push_back(gradient.contiguous().view({-1}));
  }
  return gradients;
}

void ShardUnit::drop_gradients() {
  for (ShardedParameter& p : parameters_) p.parameter->value.mutable_grad().reset();
}

std::vector<Pieces> ShardUnit::slices_of_ranks(const Pieces& gradients) const {
  std::vector<Pieces> slices(static_cast<std::size_t>(context_.grid.world().size()));
  auto gradient = gradients.begin();
  for (const ShardedParameter& p : parameters_) {
    if (!p.parameter->is_trainable) continue;
    for (int rank = 0; rank < context_.grid.world().size(); ++rank) {
      slices[static_cast<std::size_t>(rank)].push_back(gradient->narrow(0, p.layout.begin(rank), p.layout.size(rank)));
    }
    ++gradient;
  }
  return slices;
}

std::vector<Pieces> ShardUnit::slices_of_shards(const Pieces& gradients) const {
  std::vector<Pieces> slices(shard_counts_.size());
  const std::vector<Pieces> of_ranks = slices_of_ranks(gradients);
  for (std::size_t rank = 0; rank < of_ranks.size(); ++rank) {
    Pieces& shard = slices[rank / static_cast<std::size_t>(context_.grid.num_replicas())];
    shard.insert(shard.end(), of_ranks[rank].begin(), of_ranks[rank].end());
  }
  return slices;
}

std::vector<Pieces> ShardUnit::slices_of_replicas(const Pieces& sum) const {
  if (context_.grid.num_shards() == 1) return slices_of_ranks(sum);
  std::vector<Pieces> slices;
  for (const at::Tensor& slice : split_bucket(sum.front(), replica_counts_)) slices.push_back({slice});
  return slices;
}

void ShardUnit::begin_gradients(Pieces own_part, Pieces spare) {
  release_gradients();
  const int num_replicas = context_.grid.num_replicas();
  if (context_.grid.world().size() == 1) {
    gradients_ = std::move(own_part);
  } else if (!spare.empty()) {
    gradients_ = std::move(spare);
  } else {
    // With one replica the packed layout is the parameters one after another: nothing to rearrange.
    create_gradients(num_replicas == 1 ? own_part.front() : at::Tensor());
  }
  count_gradients();
  if (num_replicas == 1) return;
  gradient_stream_ = gradient_stream(std::move(own_part));
  gradient_stream_->start_all();
}

void ShardUnit::create_gradients(const at::Tensor& packed) {
  const std::int64_t count = shard_counts_[static_cast<std::size_t>(context_.grid.shard())];
  std::vector<std::int64_t> counts;
  for (const ShardedParameter& p : parameters_) {
    if (p.parameter->is_trainable) counts.push_back(p.master.numel());
  }
  gradients_ = split_bucket(packed.defined() ? packed : at::empty({count}, at::kFloat), counts);
}

void ShardUnit::count_gradients() {
  gradient_bytes_ = num_elements(gradients_) * static_cast<std::int64_t>(sizeof(float));
  context_.memory.gradients.add(gradient_bytes_);
}

std::vector<Pieces> ShardUnit::gradients_of_replicas() const {
  const int num_replicas = context_.grid.num_replicas();
  const int first_rank = context_.grid.shard() * num_replicas;
  std::vector<Pieces> parts(replica_counts_.size());
  auto gradient = gradients_.begin();
  for (const ShardedParameter& p : parameters_) {
    if (!p.parameter->is_trainable) continue;
    for (int replica = 0; replica < num_replicas; ++replica) {
      const int rank = first_rank + replica;
      parts[static_cast<std::size_t>(replica)].push_back(
          gradient->narrow(0, p.layout.begin(rank) - p.master_offset, p.layout.size(rank)));
    }
    ++gradient;
  }
  return parts;
}

std::unique_ptr<BucketStream> ShardUnit::gradient_stream(Pieces own_part) {
  Communicator& replicas = context_.grid.replicas();
  const std::int64_t per_rank = context_.buffers.replicas.numel_per_rank(at::kFloat);
  BucketStream::Steps steps;
  steps.start = [=, this, &replicas, part = std::move(own_part)](std::int64_t chunk, const at::Tensor& bucket) {
    const std::vector<std::int64_t> in_chunk = counts_of_chunk(replica_counts_, chunk, per_rank);
    const Pieces places = split_bucket(bucket.view(at::kFloat), in_chunk);
    const at::Tensor& own = places[static_cast<std::size_t>(replicas.rank())];
    copy_out(part, chunk * per_rank, own);
    return replicas.all_gather(bucket.view(at::kFloat).narrow(0, 0, num_elements(places)), own, in_chunk);
  };
  steps.finish = [=, this, results = gradients_of_replicas()](std::int64_t chunk, const at::Tensor& bucket) {
    const Pieces places = split_bucket(bucket.view(at::kFloat), counts_of_chunk(replica_counts_, chunk, per_rank));
    for (std::size_t r = 0; r < places.size(); ++r) copy_in(results[r], chunk * per_rank, places[r]);
  };
  return std::make_unique<BucketStream>(context_.buffers.replicas, num_chunks(replica_counts_, per_rank),
                                        std::move(steps));
}

void ShardUnit::begin_all_reduce(Pieces sum, at::ScalarType dtype) {
  release_gradients();
  if (context_.grid.num_shards() == 1 && !sum.empty()) {
    gradients_ = sum;
  } else {
    create_gradients(at::Tensor());
  }
  count_gradients();
  Pieces results;
  if (context_.grid.num_shards() == 1) {
    results = gradients_;
  } else {
    for (const Pieces& part : gradients_of_replicas()) results.insert(results.end(), part.begin(), part.end());
  }
  gradient_stream_ =
      all_reduce_stream(context_.grid.replicas(), context_.buffers.replicas, std::move(sum), std::move(results), dtype);
  gradient_stream_->start_all();
}

void ShardUnit::finish_gradients() {
  if (gradient_stream_) gradient_stream_->finish();
  gradient_stream_.reset();
  auto gradient = gradients_.begin();
  for (ShardedParameter& p : parameters_) {
    if (p.parameter->is_trainable) p.gradient = std::move(*gradient++);
  }
  gradients_.clear();
}

void ShardUnit::release_gradients() {
  gradient_stream_.reset();
  gradients_.clear();
  for (ShardedParameter& p : parameters_) p.gradient.reset();
  context_.memory.gradients.subtract(std::exchange(gradient_bytes_, 0));
}

}  // namespace shardtune
