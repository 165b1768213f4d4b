#pragma once
// Rotary position embedding (Su et al. 2021) in the "rotate half" layout of transformers' Llama: the pair of element i
// is element i + D / 2.
#include <ATen/core/Tensor.h>

namespace shardtune {

struct RopeTables {
  at::Tensor cos, sin;  // [T, D / 2] fp32, no gradient
};

// angle[t, i] = positions[t] * inverse_frequencies[i], computed in fp32 as transformers does.
// positions [T] int64, inverse_frequencies [D / 2] fp32.
RopeTables make_rope_tables(const at::Tensor& positions, const at::Tensor& inverse_frequencies);

// x [T, H, D] fp32, bf16 or fp16, rows of any stride -> a fresh [T, H, D]; computed in fp32, rounded once. Saves the
// tables only.
at::Tensor rope(const at::Tensor& x, const RopeTables& tables);
at::Tensor rope_reference(const at::Tensor& x, const RopeTables& tables);

}  // namespace shardtune
