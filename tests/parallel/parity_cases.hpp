#pragma once
// The parity matrix: every plan x precision x recomputation x number of micro-batches must give the bits of one rank.
#include <vector>

#include "tests/parallel/toy_run.hpp"

namespace shardtune::toy {

// Without num_ranks and plan; the base of a row is the same run of one rank under ddp that keeps everything.
struct ParityRow {
  ToyRun base;
  std::vector<RecomputeOptions> recompute;
};

inline std::vector<ParityRow> parity_rows() {
  std::vector<ParityRow> rows;
  for (const at::ScalarType dtype : {at::kFloat, at::kBFloat16, at::kHalf}) {
    for (const std::int64_t v : {4, 12}) {  // one and three micro-batches per rank at 4 ranks
      ToyRun base{.frozen = Frozen::positions, .plan = "ddp", .dtype = dtype, .num_micro_batches = v, .num_steps = 2};
      base.max_grad_norm = 1.0;
      // The other precisions of a step ride along, each with its own base.
      if (dtype == at::kBFloat16) base.state_dtype = at::kBFloat16;
      if (dtype == at::kBFloat16 && v == 12) base.reduce_dtype = at::kBFloat16;
      if (dtype == at::kHalf) base.loss_scale = 1024.0;
      rows.push_back({base,
                      {{.mode = RecomputeMode::none},
                       {.mode = RecomputeMode::full},
                       {.mode = RecomputeMode::selective, .every = v == 4 ? 1 : 2}}});
    }
  }
  return rows;
}

}  // namespace shardtune::toy
