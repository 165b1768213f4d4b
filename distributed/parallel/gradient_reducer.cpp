#include "distributed/parallel/gradient_reducer.hpp"

#include <utility>

#include "distributed/parallel/fast_reducer.hpp"
#include "distributed/parallel/tree_reducer.hpp"

namespace shardtune {

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

std::unique_ptr<GradientReducer> make_gradient_reducer(Reduction reduction, const ShardContext& context,
                                                       GradientProbe probe) {
  if (reduction == Reduction::fast) return std::make_unique<FastReducer>(context, std::move(probe));
  return std::make_unique<TreeReducer>(context, std::move(probe));
}

}  // namespace shardtune
