#include "distributed/parallel/recompute_policy.hpp"

#include <algorithm>

#include "core/error.hpp"
#include "core/memory.hpp"

namespace shardtune {

RecomputePolicy::RecomputePolicy(const RecomputeOptions& options) : options_(options) {
  check_internal(options.every >= 1 && options.budget_bytes >= 0, "RecomputePolicy: bad options");
}

RecomputePolicy::Sizes& RecomputePolicy::sizes(std::size_t unit) {
  if (unit >= sizes_.size()) sizes_.resize(unit + 1);
  return sizes_[unit];
}

bool RecomputePolicy::wants_measurement(std::size_t unit) const noexcept {
  return options_.budget_bytes > 0 && (unit >= sizes_.size() || sizes_[unit].all < 0.0);
}

RecomputeMode RecomputePolicy::choose(std::size_t unit, std::int64_t input_bytes) {
  if (options_.budget_bytes == 0) {
    return static_cast<std::int64_t>(unit) % options_.every == 0 ? options_.mode : RecomputeMode::none;
  }
  // Masters exist by now, so a counter that works shows something.
  check_internal(tensor_bytes() > 0, "an activation budget needs install_tensor_memory_counter()");
  if (wants_measurement(unit)) return RecomputeMode::selective;
  const auto budget = static_cast<double>(options_.budget_bytes);
  const double all = sizes(unit).all * static_cast<double>(input_bytes);
  const double selective = sizes(unit).selective * static_cast<double>(input_bytes);
  if (used_bytes_ + all <= budget) {
    used_bytes_ += all;
    return RecomputeMode::none;
  }
  if (used_bytes_ + selective > budget) return RecomputeMode::full;
  used_bytes_ += selective;
  return RecomputeMode::selective;
}

void RecomputePolicy::measured(std::size_t unit, std::int64_t input_bytes, std::int64_t all_bytes,
                               std::int64_t selective_bytes) {
  if (input_bytes <= 0) return;
  const auto inputs = static_cast<double>(input_bytes);
  sizes(unit).all = static_cast<double>(std::max<std::int64_t>(all_bytes, 0)) / inputs;
  sizes(unit).selective = static_cast<double>(selective_bytes) / inputs;
}

}  // namespace shardtune
