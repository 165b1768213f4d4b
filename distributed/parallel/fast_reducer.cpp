#include "distributed/parallel/fast_reducer.hpp"

#include <algorithm>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <ATen/ops/empty.h>

namespace shardtune {

FastReducer::FastReducer(const ShardContext& context, GradientProbe probe)
    : GradientReducer(context, std::move(probe)) {}

void FastReducer::add(ShardUnit& unit, std::int64_t round) {
  const at::NoGradGuard no_grad;
  UnitSum& unit_sum = sums_[&unit];
  if (!context_.plan.runs_every_round()) {
    // Nobody runs a micro-batch that is not his: what lies in .grad is his sum so far, and may stay there.
    unit_sum.held_bytes = 0;
    for (const ShardedParameter& p : unit.parameters()) {
      const at::Tensor& gradient = p.parameter->value.grad();
      if (gradient.defined()) unit_sum.held_bytes += static_cast<std::int64_t>(gradient.nbytes());
    }
    return count_partials();
  }
  Pieces gradients;
  if (schedule().micro_batch(context_.grid.world().rank(), round) >= 0) {
    gradients = take_gradients(unit);
  } else {
    unit.drop_gradients();
  }
  if (context_.grid.num_shards() > 1) {
    merge_earlier_adds(unit);
    issue_over_shards(unit, unit_sum, std::exchange(gradients, {}));
  } else if (unit_sum.whole.empty()) {
    unit_sum.whole = std::move(gradients);
  } else {
    for (std::size_t i = 0; i < gradients.size(); ++i) unit_sum.whole[i].add_(gradients[i]);
  }
  count_partials();
}

void FastReducer::issue_over_shards(ShardUnit& unit, UnitSum& unit_sum, const Pieces& gradients) {
  const ReductionAxis axis = over_shards(unit);
  const at::ScalarType dtype = context_.reduce_dtype;
  const auto own_rank = static_cast<std::size_t>(axis.ranks.rank());
  const std::int64_t per_rank = axis.buckets.numel_per_rank(dtype);
  const std::int64_t chunks = num_chunks(axis.counts, per_rank);
  std::vector<Pieces> slices;
  if (!gradients.empty()) slices = unit.slices_of_shards(gradients);
  unit_sum.out = at::empty({axis.counts[own_rank]}, dtype);
  BucketStream::Steps steps;
  steps.start = [=, &ranks = axis.ranks, counts = axis.counts, out = unit_sum.out, parts = std::move(slices)](
                    std::int64_t chunk, const at::Tensor& bucket) mutable {
    const std::vector<std::int64_t> in_chunk = counts_of_chunk(counts, chunk, per_rank);
    const at::Tensor in_bucket = bucket.view(dtype);
    const Pieces places = split_bucket(in_bucket, in_chunk);
    for (std::size_t rank = 0; rank < places.size(); ++rank) {
      if (parts.empty()) {
        places[rank].zero_();
      } else {
        copy_out(parts[rank], chunk * per_rank, places[rank]);
      }
    }
    if (chunk + 1 == chunks) parts.clear();  // they are freed as soon as they are in buckets
    const std::int64_t begin = std::min(chunk * per_rank, out.numel());
    return ranks.reduce_scatter(out.narrow(0, begin, in_chunk[own_rank]), in_bucket.narrow(0, 0, num_elements(places)),
                                in_chunk);
  };
  steps.finish = [](std::int64_t, const at::Tensor&) {};
  unit_sum.stream = std::make_unique<BucketStream>(axis.buckets, chunks, std::move(steps));
  unit_sum.stream->start_all();
}

bool FastReducer::start_over_shards(ShardUnit& unit) {
  UnitSum& unit_sum = sums_[&unit];  // new where this rank had no micro-batch: its part is zero
  if (!context_.plan.runs_every_round()) {
    unit_sum.whole = take_gradients(unit);
    unit_sum.held_bytes = 0;
    if (context_.grid.num_shards() > 1) issue_over_shards(unit, unit_sum, std::exchange(unit_sum.whole, {}));
  }
  return unit_sum.stream != nullptr;
}

bool FastReducer::start_over_replicas(ShardUnit& unit) {
  unit.begin_all_reduce(take_sum(unit), context_.reduce_dtype);
  return true;
}

void FastReducer::merge_received(ShardUnit& unit) {
  UnitSum& unit_sum = sums_[&unit];
  if (!unit_sum.stream) return;
  const at::NoGradGuard no_grad;
  unit_sum.stream->finish();
  unit_sum.stream.reset();
  const at::Tensor out = std::exchange(unit_sum.out, {});
  unit_sum.sum = unit_sum.sum.defined() ? unit_sum.sum.add_(out) : out.to(at::kFloat);
}

Pieces FastReducer::take_sum(ShardUnit& unit) {
  UnitSum& unit_sum = sums_[&unit];
  Pieces sum = std::move(unit_sum.whole);
  if (unit_sum.sum.defined()) sum = {std::move(unit_sum.sum)};
  sums_.erase(&unit);
  return sum;
}

GradientReducer::Result FastReducer::take_result(ShardUnit& unit) { return {.own_part = take_sum(unit), .spare = {}}; }

void FastReducer::count_partials() {
  std::int64_t bytes = 0;
  for (const auto& [unit, unit_sum] : sums_) {
    bytes += unit_sum.held_bytes + num_elements(unit_sum.whole) * static_cast<std::int64_t>(sizeof(float));
    for (const at::Tensor& tensor : {unit_sum.sum, unit_sum.out})
      if (tensor.defined()) bytes += static_cast<std::int64_t>(tensor.nbytes());
  }
  context_.memory.partial_sums.set(bytes);
}

}  // namespace shardtune
