#pragma once
// Which dtype is used where. A value, fixed for a run.
#include <c10/core/ScalarType.h>

namespace shardtune {

// Master weights and optimizer state are always fp32; sums of gradients are always taken in fp32.
struct PrecisionPolicy {
  at::ScalarType compute_dtype = at::kFloat;  // gathered weights and activations: kFloat or kBFloat16
};

}  // namespace shardtune
