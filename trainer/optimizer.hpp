#pragma once
// Optimizers over master shards, as rows of a table: names, state and one fused element-wise step each. State is cut like
// the masters, so the result does not depend on how parameters are cut. Frozen parameters hold no state.
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

#include "distributed/parallel/parallel_engine.hpp"
#include "trainer/options.hpp"

namespace shardtune {

struct OptimizerSettings {
  std::string name = "adamw_torch";  // a row of the table, as --optim has it
  double weight_decay = 0.0;
  double beta1 = 0.9, beta2 = 0.999, epsilon = 1e-8;  // AdamW
  at::ScalarType state_dtype = at::kFloat;            // AdamW: or kBFloat16
  double momentum = 0.0;                              // SGD
  bool nesterov = false;                              // SGD, needs momentum
};

// What --optim, --optim_args and --adam_* ask for. Error{config} for an unknown optimizer and for arguments that it does
// not take.
OptimizerSettings optimizer_settings(const TrainOptions& train);

// Settings with the same text can go on from each other's state: "adamw", "sgd", "sgd with momentum".
std::string optimizer_family(const OptimizerSettings& settings);

class Optimizer {
 public:
  struct State {
    ShardedParameter* parameter;      // owned by the engine, which must outlive the optimizer
    std::vector<at::Tensor> tensors;  // 1-d, cut like the master; one per name of state_names()
    bool decays;
  };

  // State starts at zero. Local.
  Optimizer(ParallelEngine& engine, const OptimizerSettings& settings);

  // One update of all trainable masters from ShardedParameter::gradient times gradient_scale. `step` counts from 1. Local.
  void step(double learning_rate, double gradient_scale, std::int64_t step);

  // Called by step() on every state before it and its master change (a save under way may still need the old values).
  void set_before_update(std::function<void(const State&)> hook) { before_update_ = std::move(hook); }

  // torch.optim's names of what it keeps per parameter; the names of fields in a checkpoint.
  const std::vector<std::string>& state_names() const noexcept { return state_names_; }
  std::vector<State>& states() noexcept { return states_; }
  std::int64_t state_bytes() const;

 private:
  OptimizerSettings settings_;
  std::vector<std::string> state_names_;
  std::vector<State> states_;
  std::function<void(const State&)> before_update_;
};

}  // namespace shardtune
