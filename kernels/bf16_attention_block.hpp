#pragma once
// Private to kernels/: what bf16_attention.cpp does with one block of query rows of one head in one segment. For the
// processors of bf16_tiles.hpp, compiled like it. Probabilities, and the gradients of scores, are rounded to bf16 where
// they enter a matrix product, as in every flash attention; all else is fp32. Legend: D head size padded to 32, N the
// segment's keys padded to 32, R the block's rows padded to 32. "Pairs": as Product::b.
#include <cstdint>

#include "kernels/attention_reach.hpp"

namespace shardtune::bf16 {

inline constexpr std::int64_t kForwardRows = 32;  // query rows of a block
inline constexpr std::int64_t kBackwardRows = 64;

// One head of the segment.
struct HeadView {
  std::int64_t num_keys, head_size;
  Reach reach;
  float scale;        // of the scores
  float keep_scale;   // 1 / (1 - dropout probability); 1 without dropout
  float soft_cap;     // 0 = none
  const float* bias;  // by distance, see DistanceTable::of_head; null = none
};

// The keys that a block of query rows looks at: first a multiple of 64, end one of 32.
struct KeyRange {
  std::int64_t first, end;
};
KeyRange keys_of_rows(const HeadView& head, std::int64_t row, std::int64_t rows);

// Strides of [*, N] buffers: never a multiple of 4 KiB, which would put all rows of a tile into one set of the cache.
constexpr std::int64_t row_stride(std::int64_t padded_keys) { return padded_keys + 32; }

struct ForwardKeys {
  const std::uint32_t* key_panels;   // N / 32 panels of pairs [D / 2, 32] of the transposed keys
  const std::uint32_t* value_pairs;  // [N / 2, D]
};
void pack_forward_keys(const HeadView& head, const std::uint16_t* k, std::int64_t k_stride, const std::uint16_t* v,
                       std::int64_t v_stride, std::uint16_t* rows, std::uint32_t* key_panels,
                       std::uint32_t* value_pairs);

// Working memory; sizes in elements.
struct ForwardScratch {
  std::uint16_t *queries, *probabilities;  // [32, D], [32, row_stride(N)]
  float *scores, *mixed;                   // [32, row_stride(N)], [32, D]
};
// Rows [row, row + rows) of the segment, rows <= 32. q and out point at row `row`. keep: [rows, keep_stride] words, bit
// i of word w = key (first of keys_of_rows) + 64 w + i is kept; null without dropout. log_sum_exp: of row `row`.
struct ForwardBlock {
  std::int64_t row, rows;
  const std::uint16_t* q;
  std::int64_t q_stride;
  const std::uint64_t* keep;
  std::int64_t keep_stride;
  std::uint16_t* out;
  std::int64_t out_stride;
  float* log_sum_exp;
  std::int64_t log_sum_exp_stride;
};
void forward_block(const HeadView& head, const ForwardKeys& keys, const ForwardBlock& block,
                   const ForwardScratch& scratch);

// Keys of the segment for all its backward blocks, and the sums of their gradients.
struct BackwardKeys {
  std::uint16_t *keys, *values;    // [N, D]
  std::uint16_t* keys_transposed;  // [D, row_stride(N)]
  float *d_keys, *d_values;        // [N, D]
};
// Fills the first three, zeroes the last two. word_scratch: [N / 2, D].
void pack_backward_keys(const HeadView& head, const std::uint16_t* k, std::int64_t k_stride, const std::uint16_t* v,
                        std::int64_t v_stride, const BackwardKeys& keys, std::uint32_t* word_scratch);

struct BackwardScratch {
  std::uint16_t *queries, *grads, *probabilities, *d_scores_rows;  // [R, D] twice; [32, R] twice, rows are keys
  std::uint32_t *query_pairs, *grad_pairs;                         // [R / 2, D]
  std::uint32_t *queries_transposed, *grads_transposed;            // pairs [D / 2, R]
  std::uint32_t* d_scores;                                         // pairs [N / 2, R]
  float *scores, *d_probabilities, *d_queries;                     // [32, R] twice, [D, R]
  float* d_query_rows;                                             // [R, D]
};
// As ForwardBlock; rows <= 64. keep: a word of the block's queries for each key from the first on, bit i = query row +
// i keeps that key. d_bias: sums by distance that this block adds to, laid out as the bias; null without one.
struct BackwardBlock {
  std::int64_t row, rows;
  const std::uint16_t *q, *grad, *out;
  std::int64_t q_stride, grad_stride, out_stride;
  const float* log_sum_exp;
  std::int64_t log_sum_exp_stride;
  std::int64_t first_key;  // of keys_of_rows
  const std::uint64_t* keep;
  std::uint16_t* d_q;
  std::int64_t d_q_stride;
  float* d_bias;
};
void backward_block(const HeadView& head, const BackwardKeys& keys, const BackwardBlock& block,
                    const BackwardScratch& scratch);

}  // namespace shardtune::bf16
