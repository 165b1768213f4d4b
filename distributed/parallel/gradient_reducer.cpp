#include "distributed/parallel/gradient_reducer.hpp"

#include <utility>

#include "core/error.hpp"
#include "distributed/parallel/fast_reducer.hpp"
#include "distributed/parallel/tree_reducer.hpp"

namespace shardtune {

GradientReducer::GradientReducer(const ShardContext& context, GradientProbe probe)
    : context_(context), probe_(std::move(probe)) {}

void GradientReducer::begin_step(const RoundSchedule& schedule) {
  schedule_ = schedule;
  last_add_ = nullptr;
  finishing_.clear();
  stages_.clear();
  forget_sums();
  count_partials();
}

const RoundSchedule& GradientReducer::schedule() const {
  check_internal(schedule_.has_value(), "GradientReducer: no step has begun");
  return *schedule_;
}

Pieces GradientReducer::take_gradients(ShardUnit& unit) {
  Pieces gradients = unit.take_gradients();
  if (probe_) probe_(unit.unit().name, gradients);
  return gradients;
}

ReductionAxis GradientReducer::over_shards(const ShardUnit& unit) const {
  return {context_.grid.shards(), context_.buffers.shards, unit.shard_counts()};
}

ReductionAxis GradientReducer::over_replicas(const ShardUnit& unit) const {
  return {context_.grid.replicas(), context_.buffers.replicas, unit.replica_counts()};
}

void GradientReducer::merge(ShardUnit& unit) {
  if (last_add_ == &unit) last_add_ = nullptr;
  merge_received(unit);
}

void GradientReducer::merge_last_add() {
  if (last_add_ != nullptr) merge(*last_add_);
}

bool GradientReducer::advance(ShardUnit& unit) {
  const bool has_replicas = context_.grid.num_replicas() > 1;
  for (;;) {
    switch (stages_[&unit]++) {
      case 0:
        if (start_over_shards(unit)) return true;
        break;
      case 1:
        merge(unit);
        if (!has_replicas) break;
        if (start_over_replicas(unit)) ++stages_[&unit];
        return true;
      case 2: {
        merge(unit);
        Result result = take_result(unit);
        unit.begin_gradients(std::move(result.own_part), std::move(result.spare));
        if (has_replicas) return true;
        break;
      }
      default:
        unit.finish_gradients();
        stages_.erase(&unit);
        return false;
    }
  }
}

void GradientReducer::finish(ShardUnit& unit) {
  const std::deque<ShardUnit*> earlier = std::exchange(finishing_, {});
  const bool is_under_way = advance(unit);
  for (ShardUnit* other : earlier) {
    if (advance(*other)) finishing_.push_back(other);
  }
  if (is_under_way) finishing_.push_back(&unit);
  count_partials();
}

void GradientReducer::finish_all() {
  while (!finishing_.empty()) {
    ShardUnit* const unit = finishing_.front();
    finishing_.pop_front();
    if (advance(*unit)) finishing_.push_back(unit);
  }
  count_partials();
}

std::unique_ptr<GradientReducer> make_gradient_reducer(ReductionOrder order, const ShardContext& context,
                                                       GradientProbe probe) {
  if (order == ReductionOrder::fast) return std::make_unique<FastReducer>(context, std::move(probe));
  return std::make_unique<TreeReducer>(context, std::move(probe));
}

}  // namespace shardtune
