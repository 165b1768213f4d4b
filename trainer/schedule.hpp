#pragma once
// Learning rates as Hugging Face's get_scheduler gives them. A value; thread-safe.
#include <cstdint>
#include <string>

namespace shardtune {

class LearningRateSchedule {
 public:
  enum class Kind { linear, constant, constant_with_warmup };

  // name: "linear", "constant" or "constant_with_warmup" (Error{config} otherwise).
  LearningRateSchedule(const std::string& name, double base_rate, std::int64_t warmup_steps, std::int64_t total_steps);

  // Rate of optimizer step `step`, counted from 0.
  double at(std::int64_t step) const;

 private:
  Kind kind_;
  double base_rate_;
  std::int64_t warmup_steps_, total_steps_;
};

// HF: warmup_steps below 1 and warmup_ratio are shares of all steps, rounded up.
std::int64_t resolve_warmup(double warmup_steps, double warmup_ratio, std::int64_t total_steps);
// HF: an interval below 1 is a share of all steps, rounded up.
std::int64_t resolve_interval(double steps, std::int64_t total_steps);

}  // namespace shardtune
