#include "distributed/parallel/round_schedule.hpp"

#include "core/error.hpp"

namespace shardtune {
namespace {

RoundSchedule::Range part(RoundSchedule::Range whole, int index, int count) noexcept {
  const std::int64_t size = whole.second - whole.first;
  return {whole.first + index * size / count, whole.first + (index + 1) * size / count};
}

}  // namespace

RoundSchedule::RoundSchedule(const ShardingPlan& plan, Shape shape, std::int64_t num_micro_batches)
    : is_dealt_per_round_(plan.reduce_every_microbatch), shape_(shape), num_micro_batches_(num_micro_batches) {
  check_internal(num_micro_batches >= 1, "RoundSchedule: a step needs at least one micro-batch");
}

std::int64_t RoundSchedule::num_rounds() const noexcept {
  const std::int64_t num_ranks = std::int64_t{shape_.num_shards} * shape_.num_replicas;
  return (num_micro_batches_ + num_ranks - 1) / num_ranks;
}

RoundSchedule::Range RoundSchedule::range_of_replica(int replica) const noexcept {
  return part({0, num_micro_batches_}, replica, shape_.num_replicas);
}

RoundSchedule::Range RoundSchedule::range(int shard, int replica) const noexcept {
  return part(range_of_replica(replica), shard, shape_.num_shards);
}

std::int64_t RoundSchedule::micro_batch(int rank, std::int64_t round) const noexcept {
  const int shard = rank / shape_.num_replicas;
  const int replica = rank % shape_.num_replicas;
  const Range dealt = is_dealt_per_round_ ? range_of_replica(replica) : range(shard, replica);
  const std::int64_t index = dealt.first + (is_dealt_per_round_ ? round * shape_.num_shards + shard : round);
  return index < dealt.second ? index : -1;
}

}  // namespace shardtune
