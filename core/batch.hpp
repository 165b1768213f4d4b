#pragma once
// One micro-batch: a flat row of T real tokens made of S segments (examples); there is no padding anywhere.
// Legend: T tokens of the row, S segments, C classes.
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace shardtune {

struct Batch {
  at::Tensor ids;          // [T] int64
  at::Tensor positions;    // [T] int64, restart at 0 in every segment
  at::Tensor token_types;  // [T] int64 where the family has them, else undefined
  std::vector<std::int64_t> segment_offsets;  // S + 1 entries, first 0, last T, strictly increasing
  // Sequence classification: [S] int64 class (or [S] fp32 for regression).
  // Causal LM: [T] int64, ALREADY SHIFTED: labels[t] is the token that position t must predict, -100 = not counted
  // (the last token of each segment is always -100). Undefined when there are no labels.
  at::Tensor labels;
  std::vector<std::int64_t> example_index;  // S entries: row of the data set each segment came from

  std::int64_t num_tokens() const { return segment_offsets.empty() ? 0 : segment_offsets.back(); }
  std::int64_t num_segments() const { return static_cast<std::int64_t>(segment_offsets.size()) - 1; }
};

// Where in the run a forward pass stands: the key of every random number it draws.
struct ForwardContext {
  bool is_training = false;     // dropout on
  std::uint64_t seed = 0;
  std::int64_t step = 0;        // optimizer step, from 0
  std::int64_t micro_batch = 0; // index inside the step, from 0, the same whatever the number of ranks
};

}  // namespace shardtune
