#pragma once
// What the tests of attention share: cases, runs of kernel and reference, error bounds.
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/attention.hpp"

namespace shardtune::testing {

bool has_bf16_products();

struct AttentionCase {
  std::vector<std::int64_t> offsets;
  std::int64_t heads, kv_heads, head_size;
  bool is_causal = false;
  double dropout = 0;
  at::ScalarType dtype = at::kFloat;
  std::int64_t window = 0;
  double soft_cap = 0;
  bool has_bias = false;

  std::int64_t tokens() const { return offsets.back(); }
  std::int64_t longest() const;
  AttentionOptions options() const;  // without the bias
  std::string text() const;
};

struct AttentionInputs {
  at::Tensor q, k, v, seed, bias;  // bias: undefined where the case has none; longer than the longest segment needs
  explicit AttentionInputs(const AttentionCase& c);
};

// Output and gradients, or how far they may be off.
struct AttentionRun {
  at::Tensor out, dq, dk, dv, d_bias;                             // d_bias: undefined where the case has no bias
  std::vector<std::pair<const char*, at::Tensor>> named() const;  // those that are defined
  std::vector<at::Tensor> all() const;
};

// reference: in fp64.
AttentionRun run(const AttentionCase& c, const AttentionInputs& in, bool reference = false);

// Values and gradients of the kernel lie within the rounding of fp64 ones.
void expect_near_fp64(const AttentionCase& c);
// So they do for causal and other attention in every dtype.
void expect_near_fp64_in_every_mode(AttentionCase c);

}  // namespace shardtune::testing
