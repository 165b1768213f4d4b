#pragma once
// Private to kernels/: what the ways of computing attention share of window, cap and bias by distance. Legend as in
// attention.hpp.
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

#include "kernels/attention.hpp"
#include "kernels/attention_reach.hpp"

namespace shardtune {

// Causal: the last `window` keys, the query's own among them; otherwise `window` keys on either side, as transformers'
// masks have it.
Reach reach_of(const AttentionOptions& options);
// Whether a cap, a bias or a window that hides keys act on a segment of `length` tokens.
bool has_hooks(const AttentionOptions& options, std::int64_t length);

// The bias of every head by distance (key minus query), with a margin for vectors that reach beyond a segment.
class DistanceTable {
 public:
  static constexpr std::int64_t kMargin = 64;
  // Numbers of a row for segments of up to `longest` tokens, and where in it distance 0 lies.
  static constexpr std::int64_t row_size(std::int64_t longest) { return 2 * longest - 1 + 2 * kMargin; }
  static constexpr std::int64_t origin(std::int64_t longest) { return kMargin + longest - 1; }

  // bias as in AttentionOptions; empty when it is undefined.
  DistanceTable(const at::Tensor& bias, std::int64_t longest);
  // Where distance 0 of a head lies: entries [-longest - 63, longest + 63] may be read; null without a bias.
  const float* of_head(std::int64_t head) const {
    return table_.defined() ? table_.const_data_ptr<float>() + head * row_size(longest_) + origin(longest_) : nullptr;
  }

 private:
  at::Tensor table_;  // [H, row_size]
  std::int64_t longest_;
};

// The gradient of the bias comes in two steps, so that its bits do not depend on threads: sums over the diagonals of
// each segment and head, [H, 2 T] fp32 zeroed, and then over segments in their order. Entry 2 begin + (n - 1) +
// distance of a head belongs to the segment of n tokens that starts at `begin`.
at::Tensor make_diagonal_sums(std::int64_t num_heads, std::int64_t tokens);
inline float* diagonals_of(at::Tensor& sums, std::int64_t head, std::int64_t begin) {
  return sums.mutable_data_ptr<float>() + head * sums.size(1) + 2 * begin;
}
// -> [H, width] fp32, width odd; the middle is distance 0.
at::Tensor sum_over_segments(const at::Tensor& sums, const std::vector<std::int64_t>& offsets, std::int64_t width);

}  // namespace shardtune
