#pragma once
// AdamW over master shards. State is fp32 or bf16, cut like the masters; element-wise maths, so the result does not depend
// on how parameters are cut. Frozen parameters hold no state.
#include <cstdint>
#include <functional>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "distributed/parallel/parallel_engine.hpp"

namespace shardtune {

struct AdamWSettings {
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8, weight_decay = 0.0;
  at::ScalarType state_dtype = at::kFloat;  // or kBFloat16
};

class AdamW {
 public:
  struct State {
    ShardedParameter* parameter;   // owned by the engine, which must outlive the optimizer
    at::Tensor exp_avg, exp_avg_sq;
    bool decays;
  };

  // State starts at zero. Local.
  AdamW(ParallelEngine& engine, const AdamWSettings& settings);

  // One update of all trainable masters from ShardedParameter::gradient times gradient_scale. `step` counts from 1. Local.
  void step(double learning_rate, double gradient_scale, std::int64_t step);

  // Called by step() on every state before it and its master change (a save under way may still need the old values).
  void set_before_update(std::function<void(const State&)> hook) { before_update_ = std::move(hook); }

  std::vector<State>& states() noexcept { return states_; }
  std::int64_t state_bytes() const;

 private:
  AdamWSettings settings_;
  std::vector<State> states_;
  std::function<void(const State&)> before_update_;
};

}  // namespace shardtune
