#include "trainer/optimizer.hpp"

#include <ATen/ATen.h>

#include "core/hash.hpp"
#include "kernels/adamw.hpp"

namespace shardtune {

AdamW::AdamW(ParallelEngine& engine, const AdamWSettings& settings) : settings_(settings) {
  for (ShardedParameter* p : engine.trainable()) {
    states_.push_back({.parameter = p,
                       .exp_avg = at::zeros({p->master.numel()}, settings.state_dtype),
                       .exp_avg_sq = at::zeros({p->master.numel()}, settings.state_dtype),
                       .decays = has_weight_decay(*p->parameter)});
  }
}

void AdamW::step(double learning_rate, double gradient_scale, std::int64_t step) {
  for (State& state : states_) {
    if (before_update_) before_update_(state);
    adamw_step({.param = state.parameter->master,
                .exp_avg = state.exp_avg,
                .exp_avg_sq = state.exp_avg_sq,
                .grad = state.parameter->gradient,
                .offset = state.parameter->master_offset},
               {.lr = learning_rate,
                .beta1 = settings_.beta1,
                .beta2 = settings_.beta2,
                .eps = settings_.epsilon,
                .weight_decay = state.decays ? settings_.weight_decay : 0.0,
                .step = step,
                .rounding_key = hash_bytes(state.parameter->parameter->name),
                .grad_scale = gradient_scale});
  }
}

std::int64_t AdamW::state_bytes() const {
  std::int64_t bytes = 0;
  for (const State& state : states_) bytes += 2 * static_cast<std::int64_t>(state.exp_avg.nbytes());
  return bytes;
}

}  // namespace shardtune
