#include "distributed/parallel/gradient_reducer.hpp"

#include <utility>

#include "core/error.hpp"
#include "distributed/parallel/fast_reducer.hpp"
#include "distributed/parallel/tree_reducer.hpp"

namespace shardtune {

namespace {

// How many units later a sum is waited for. Two where a network works meanwhile, because units differ in what they
// compute and send; a node's own cores would only keep more memory in use (measured: docs/performance.md).
std::size_t lag(const Communicator& ranks) { return ranks.runs_on_own_cores() ? 1 : 2; }

}  // namespace

GradientReducer::GradientReducer(const ShardContext& context, GradientProbe probe)
    : context_(context), probe_(std::move(probe)) {}

void GradientReducer::begin_step(const RoundSchedule& schedule) {
  // Of a step that was given up: in the order in which all ranks have begun them, so that they agree about buckets.
  while (!added_.empty()) merge(*added_.front());
  schedule_ = schedule;
  finishing_.clear();
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
  std::erase(added_, &unit);
  merge_received(unit);
}

void GradientReducer::merge_earlier_adds(ShardUnit& unit) {
  while (added_.size() >= lag(context_.grid.shards())) merge(*added_.front());
  if (!added_.empty() && added_.front() == &unit) merge(unit);
  added_.push_back(&unit);
}

const Communicator& GradientReducer::last_group() const {
  return context_.grid.num_replicas() > 1 ? context_.grid.replicas() : context_.grid.shards();
}

bool GradientReducer::is_last_wait(const Finishing& finishing) const {
  return finishing.stage == (context_.grid.num_replicas() > 1 ? 3 : 1);
}

bool GradientReducer::advance(Finishing& finishing) {
  const bool has_replicas = context_.grid.num_replicas() > 1;
  ShardUnit& unit = *finishing.unit;
  finishing.num_calls = 0;
  for (;;) {
    switch (finishing.stage++) {
      case 0:
        if (start_over_shards(unit)) return true;
        break;
      case 1:
        merge(unit);
        if (!has_replicas) break;
        if (start_over_replicas(unit)) ++finishing.stage;
        return true;
      case 2: {
        merge(unit);
        Result result = take_result(unit);
        unit.begin_gradients(std::move(result.own_part), std::move(result.spare));
        if (has_replicas) return true;
        break;
      }
      default: unit.finish_gradients(); return false;
    }
  }
}

// What was begun earlier comes first: its buckets are free for what is begun now.
void GradientReducer::finish(ShardUnit& unit) {
  for (Finishing& earlier : std::exchange(finishing_, {})) {
    const std::size_t wanted_calls = is_last_wait(earlier) ? lag(last_group()) : 1;
    if (++earlier.num_calls < wanted_calls || advance(earlier)) finishing_.push_back(earlier);
  }
  Finishing own{.unit = &unit};
  if (advance(own)) finishing_.push_back(own);
  count_partials();
}

void GradientReducer::finish_all() {
  while (!finishing_.empty()) {
    Finishing first = finishing_.front();
    finishing_.pop_front();
    if (advance(first)) finishing_.push_back(first);
  }
  count_partials();
}

std::unique_ptr<GradientReducer> make_gradient_reducer(ReductionOrder order, const ShardContext& context,
                                                       GradientProbe probe) {
  if (order == ReductionOrder::fast) return std::make_unique<FastReducer>(context, std::move(probe));
  return std::make_unique<TreeReducer>(context, std::move(probe));
}

}  // namespace shardtune
