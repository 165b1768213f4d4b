#include "trainer/schedule.hpp"

#include <algorithm>
#include <cmath>

#include <fmt/format.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

LearningRateSchedule::Kind parse_kind(const std::string& name) {
  using Kind = LearningRateSchedule::Kind;
  if (name == "linear") return Kind::linear;
  if (name == "constant") return Kind::constant;
  if (name == "constant_with_warmup") return Kind::constant_with_warmup;
  fail(ErrorKind::config, fmt::format("--lr_scheduler_type = {}: use linear, constant or constant_with_warmup", name));
}

}  // namespace

LearningRateSchedule::LearningRateSchedule(const std::string& name, double base_rate, std::int64_t warmup_steps,
                                           std::int64_t total_steps)
    : kind_(parse_kind(name)), base_rate_(base_rate), warmup_steps_(warmup_steps), total_steps_(total_steps) {}

double LearningRateSchedule::at(std::int64_t step) const {
  if (kind_ == Kind::constant) return base_rate_;
  if (step < warmup_steps_)
    return base_rate_ * (static_cast<double>(step) / static_cast<double>(std::max<std::int64_t>(1, warmup_steps_)));
  if (kind_ == Kind::constant_with_warmup) return base_rate_;
  const auto left = static_cast<double>(total_steps_ - step);
  const auto span = static_cast<double>(std::max<std::int64_t>(1, total_steps_ - warmup_steps_));
  return base_rate_ * std::max(0.0, left / span);
}

std::int64_t resolve_warmup(double warmup_steps, double warmup_ratio, std::int64_t total_steps) {
  const auto total = static_cast<double>(total_steps);
  if (warmup_steps >= 1) return static_cast<std::int64_t>(warmup_steps);
  if (warmup_steps > 0) return static_cast<std::int64_t>(std::ceil(total * warmup_steps));
  return static_cast<std::int64_t>(std::ceil(total * warmup_ratio));
}

std::int64_t resolve_interval(double steps, std::int64_t total_steps) {
  if (steps >= 1) return static_cast<std::int64_t>(steps);
  return std::max<std::int64_t>(1, static_cast<std::int64_t>(std::ceil(static_cast<double>(total_steps) * steps)));
}

}  // namespace shardtune
