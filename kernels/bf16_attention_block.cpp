#include "kernels/bf16_attention_block.hpp"

#include <math.h>

#include "kernels/bf16_lanes.hpp"
#include "kernels/bf16_tiles.hpp"

// Compiled for avx512_bf16 (see CMakeLists.txt); no templates of the standard library in here.
namespace shardtune::bf16 {
namespace {

constexpr __mmask16 kAllLanes = 0xFFFF;
constexpr float kLog2E = 1.44269504088896341F, kLn2 = 0.693147180559945309F;

__mmask16 lanes_of(std::uint64_t bits, std::int64_t first) { return static_cast<__mmask16>(bits >> first); }

// 2^x for x <= 0 (a little above does no harm): Taylor series on [-1/2, 1/2], relative error below 2e-7; 0 below -200,
// NaN stays NaN.
__m512 exp2_lanes(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-200.0F), x);  // the second operand is the result when either is NaN
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);
  __m512 p = _mm512_set1_ps(1.54035304e-4F);
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.33335581e-3F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(9.61812911e-3F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(5.55041087e-2F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(2.40226507e-1F));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(kLn2));
  p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(1.0F));
  return _mm512_scalef_ps(p, n);
}

// As simd::tanh.
__m512 tanh_lanes(__m512 x) {
  const __m512 one = _mm512_set1_ps(1.0F), magnitude = _mm512_abs_ps(x), square = _mm512_mul_ps(x, x);
  const __m512 e = exp2_lanes(_mm512_mul_ps(magnitude, _mm512_set1_ps(-2.0F * kLog2E)));
  const __m512 far = _mm512_div_ps(_mm512_sub_ps(one, e), _mm512_add_ps(one, e));
  __m512 p = _mm512_set1_ps(-5.70498872745e-3F);
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(2.06390887954e-2F));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-5.37397155531e-2F));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(1.33314422036e-1F));
  p = _mm512_fmadd_ps(p, square, _mm512_set1_ps(-3.33332819422e-1F));
  const __m512 near = _mm512_fmadd_ps(_mm512_mul_ps(x, square), p, x);
  const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0F));
  return _mm512_mask_mov_ps(_mm512_or_ps(far, sign), _mm512_cmp_ps_mask(magnitude, _mm512_set1_ps(0.625F), _CMP_LT_OQ),
                            near);
}

// Cap, bias and the window's near end on the scores of one row of the segment, in place; scores: from key `first` on.
// Returns what is left to multiply them with for exponents of 2.
float adjust_row(const HeadView& head, std::int64_t row, const KeyRange& range, float* scores) {
  float factor = head.scale * kLog2E;
  const __m512 scale = _mm512_set1_ps(head.scale), cap = _mm512_set1_ps(head.soft_cap);
  if (head.soft_cap > 0 || head.bias != nullptr) {
    for (std::int64_t j = 0; j < range.end - range.first; j += kLanes) {
      __m512 x = _mm512_mul_ps(_mm512_loadu_ps(scores + j), scale);
      if (head.soft_cap > 0) x = _mm512_mul_ps(tanh_lanes(_mm512_div_ps(x, cap)), cap);
      if (head.bias != nullptr) x = _mm512_add_ps(x, _mm512_loadu_ps(head.bias + (range.first - row) + j));
      _mm512_storeu_ps(scores + j, x);
    }
    factor = kLog2E;
  }
  const std::int64_t hidden = head.reach.first_key(row) - range.first;
  for (std::int64_t j = 0; j < hidden; j += kLanes)
    _mm512_mask_storeu_ps(scores + j, lanes_below(hidden - j), _mm512_set1_ps(-INFINITY));
  return factor;
}

// Scores of one row, the first `limit` of them valid, -> exp2(factor * score - largest) in bf16, zeros up to `columns`.
// *largest as above; returns the sum of the fp32 exponentials, dropped ones included.
float exponentials_of_row(const float* scores, std::int64_t limit, std::int64_t columns, float factor,
                          const std::uint64_t* keep, std::uint16_t* into, float* largest) {
  const __m512 scale = _mm512_set1_ps(factor), none = _mm512_set1_ps(-INFINITY);
  __m512 most = none;
  for (std::int64_t j = 0; j < limit; j += kLanes) {
    const __mmask16 valid = lanes_below(limit - j);
    most = _mm512_mask_max_ps(most, valid, most, _mm512_mul_ps(_mm512_loadu_ps(scores + j), scale));
  }
  *largest = _mm512_reduce_max_ps(most);
  const __m512 shift = _mm512_set1_ps(*largest);
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const __mmask16 valid = lanes_below(limit - j);
    __m512 e = exp2_lanes(_mm512_fmsub_ps(_mm512_loadu_ps(scores + j), scale, shift));
    e = _mm512_maskz_mov_ps(valid, e);
    sum = _mm512_add_ps(sum, e);
    if (keep != nullptr) e = _mm512_maskz_mov_ps(lanes_of(keep[j / 64], j % 64), e);
    store_bf16(into + j, kAllLanes, e);
  }
  return _mm512_reduce_add_ps(sum);
}

float dot(const std::uint16_t* a, const std::uint16_t* b, std::int64_t size) {
  __m512 sum = _mm512_setzero_ps();
  for (std::int64_t i = 0; i < size; i += kLanes) {
    const __mmask16 lanes = lanes_below(size - i);
    sum = _mm512_fmadd_ps(load_bf16(a + i, lanes), load_bf16(b + i, lanes), sum);
  }
  return _mm512_reduce_add_ps(sum);
}

// What backward_block keeps in registers or on the stack for its rows.
struct RowNumbers {
  alignas(64) float log_sum_exp[kBackwardRows];  // in units of log 2
  alignas(64) float mean[kBackwardRows];  // sum over keys of p dp, which is the dot product of output and gradient
};

void prepare_rows(const HeadView& head, const BackwardBlock& block, RowNumbers& numbers) {
  for (std::int64_t r = 0; r < kBackwardRows; ++r) {
    // Beyond the last row every probability becomes 0.
    numbers.log_sum_exp[r] = r < block.rows ? block.log_sum_exp[r * block.log_sum_exp_stride] * kLog2E : 1e30F;
    numbers.mean[r] = r < block.rows
                          ? dot(block.out + r * block.out_stride, block.grad + r * block.grad_stride, head.head_size)
                          : 0.0F;
  }
}

// Sixteen scores of one key: `distance` lies between it and the first of their queries, the next ones are nearer.
struct ScoreLanes {
  __m512 exponent, slope;  // in units of log 2; derivative of the score after the cap by the one before
};
__m512 reversed(__m512 x) {
  return _mm512_permutexvar_ps(_mm512_set_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15), x);
}
ScoreLanes adjust_lanes(const HeadView& head, std::int64_t distance, __m512 score) {
  __m512 x = _mm512_mul_ps(score, _mm512_set1_ps(head.scale)), slope = _mm512_set1_ps(1.0F);
  if (head.soft_cap > 0) {
    const __m512 cap = _mm512_set1_ps(head.soft_cap), t = tanh_lanes(_mm512_div_ps(x, cap));
    x = _mm512_mul_ps(t, cap);
    slope = _mm512_fnmadd_ps(t, t, slope);
  }
  if (head.bias != nullptr) x = _mm512_add_ps(x, reversed(_mm512_loadu_ps(head.bias + distance - (kLanes - 1))));
  return {_mm512_mul_ps(x, _mm512_set1_ps(kLog2E)), slope};
}

// Scores and gradients of probabilities of 32 keys (rows) and the block's queries (columns) -> probabilities and
// gradients of scores in bf16. first_key: of the segment. kIsHooked: with cap, bias, or queries that do not see all of
// these keys for the window; the plain one has none of it.
template <bool kIsHooked>
void differentiate(const HeadView& head, const BackwardBlock& block, const RowNumbers& numbers, std::int64_t first_key,
                   std::int64_t width, const BackwardScratch& s) {
  const __m512 factor = _mm512_set1_ps(head.scale * kLog2E), scale = _mm512_set1_ps(head.scale),
               keep_scale = _mm512_set1_ps(head.keep_scale);
  const std::uint64_t* keep_words = block.keep == nullptr ? nullptr : block.keep + (first_key - block.first_key);
  for (std::int64_t i = 0; i < kBlock; ++i) {
    const std::int64_t key = first_key + i;
    for (std::int64_t c = 0; c < width; c += kLanes) {
      // A query sees keys up to so many after itself.
      const std::int64_t distance = key - block.row - c, hidden = distance - head.reach.ahead;
      __mmask16 seen = key < head.num_keys ? static_cast<__mmask16>(~lanes_below(hidden)) : __mmask16{0};
      const std::int64_t at = i * width + c;
      ScoreLanes adjusted;
      if constexpr (kIsHooked) {
        seen &= lanes_below(distance + head.reach.behind + 1);
        adjusted = adjust_lanes(head, distance, _mm512_loadu_ps(s.scores + at));
      }
      const __m512 log_sum_exp = _mm512_load_ps(numbers.log_sum_exp + c);
      const __m512 exponent = kIsHooked ? _mm512_sub_ps(adjusted.exponent, log_sum_exp)
                                        : _mm512_fmsub_ps(_mm512_loadu_ps(s.scores + at), factor, log_sum_exp);
      const __m512 p = _mm512_maskz_mov_ps(seen, exp2_lanes(exponent));
      __m512 kept = p, d_p = _mm512_loadu_ps(s.d_probabilities + at);
      if (keep_words != nullptr) {
        const __mmask16 keep = lanes_of(keep_words[i], c);
        kept = _mm512_maskz_mov_ps(keep, p);
        d_p = _mm512_maskz_mul_ps(keep, d_p, keep_scale);
      }
      const __m512 away = _mm512_sub_ps(d_p, _mm512_load_ps(numbers.mean + c));
      __m512 d_score = _mm512_mul_ps(_mm512_mul_ps(p, scale), away);
      if constexpr (kIsHooked) {
        if (block.d_bias != nullptr) {
          float* into = block.d_bias + distance - (kLanes - 1);
          const __m512 share = reversed(_mm512_maskz_mul_ps(seen, p, away));
          _mm512_storeu_ps(into, _mm512_add_ps(_mm512_loadu_ps(into), share));
        }
        d_score = _mm512_mul_ps(d_score, adjusted.slope);
      }
      store_bf16(s.probabilities + at, kAllLanes, kept);
      store_bf16(s.d_scores_rows + at, kAllLanes, _mm512_maskz_mov_ps(seen, d_score));
    }
  }
}

}  // namespace

KeyRange keys_of_rows(const HeadView& head, std::int64_t row, std::int64_t rows) {
  return {head.reach.first_key(row) / 64 * 64, padded(head.reach.end_key(row + rows - 1, head.num_keys))};
}

void pack_forward_keys(const HeadView& head, const std::uint16_t* k, std::int64_t k_stride, const std::uint16_t* v,
                       std::int64_t v_stride, std::uint16_t* rows, std::uint32_t* key_panels,
                       std::uint32_t* value_pairs) {
  const std::int64_t depth = padded(head.head_size), keys = padded(head.num_keys);
  copy_rows(v, v_stride, head.num_keys, head.head_size, rows, depth);
  pair_rows(rows, depth, keys, depth, value_pairs, depth);
  copy_rows(k, k_stride, head.num_keys, head.head_size, rows, depth);
  for (std::int64_t key = 0; key < keys; key += kBlock)
    transpose_words(reinterpret_cast<const std::uint32_t*>(rows + key * depth), depth / 2, kBlock, depth / 2,
                    key_panels + key * depth / 2, kBlock);
}

void forward_block(const HeadView& head, const ForwardKeys& keys, const ForwardBlock& block,
                   const ForwardScratch& scratch) {
  const std::int64_t depth = padded(head.head_size), stride = row_stride(padded(head.num_keys));
  const KeyRange range = keys_of_rows(head, block.row, block.rows);
  const std::int64_t first = range.first, columns = range.end - first;
  const bool is_hooked = head.soft_cap > 0 || head.bias != nullptr || head.reach.behind < head.num_keys;
  copy_rows(block.q, block.q_stride, block.rows, head.head_size, scratch.queries, depth);
  for (std::int64_t key = first; key < range.end; key += kBlock)
    multiply({scratch.queries, depth, keys.key_panels + key * depth / 2, kBlock, scratch.scores + key, stride, kBlock,
              kBlock, depth});
  float inverse[kForwardRows] = {};
  for (std::int64_t r = 0; r < block.rows; ++r) {
    float* scores = scratch.scores + r * stride + first;
    const float factor = is_hooked ? adjust_row(head, block.row + r, range, scores) : head.scale * kLog2E;
    float largest = 0;
    const float sum = exponentials_of_row(scores, head.reach.end_key(block.row + r, head.num_keys) - first, columns,
                                          factor, block.keep == nullptr ? nullptr : block.keep + r * block.keep_stride,
                                          scratch.probabilities + r * stride + first, &largest);
    inverse[r] = head.keep_scale / sum;
    block.log_sum_exp[r * block.log_sum_exp_stride] =
        static_cast<float>(static_cast<double>(largest) * static_cast<double>(kLn2) + log(static_cast<double>(sum)));
  }
  // Rows beyond the last one hold what an earlier block left; their products are not used.
  multiply({scratch.probabilities + first, stride, keys.value_pairs + first / 2 * depth, depth, scratch.mixed, depth,
            kBlock, depth, columns});
  for (std::int64_t r = 0; r < block.rows; ++r)
    store_block({scratch.mixed + r * depth, depth, 1, head.head_size},
                {block.out + r * block.out_stride, block.out_stride}, inverse[r]);
}

void pack_backward_keys(const HeadView& head, const std::uint16_t* k, std::int64_t k_stride, const std::uint16_t* v,
                        std::int64_t v_stride, const BackwardKeys& keys, std::uint32_t* word_scratch) {
  const std::int64_t depth = padded(head.head_size), rows = padded(head.num_keys);
  copy_rows(k, k_stride, head.num_keys, head.head_size, keys.keys, depth);
  copy_rows(v, v_stride, head.num_keys, head.head_size, keys.values, depth);
  pair_rows(keys.keys, depth, rows, depth, word_scratch, depth);
  transpose_words(word_scratch, depth, rows / 2, depth, reinterpret_cast<std::uint32_t*>(keys.keys_transposed),
                  row_stride(rows) / 2);
  for (std::int64_t i = 0; i < rows * depth; i += kLanes) {
    _mm512_storeu_ps(keys.d_keys + i, _mm512_setzero_ps());
    _mm512_storeu_ps(keys.d_values + i, _mm512_setzero_ps());
  }
}

void backward_block(const HeadView& head, const BackwardKeys& keys, const BackwardBlock& block,
                    const BackwardScratch& s) {
  const std::int64_t depth = padded(head.head_size), width = padded(block.rows),
                     stride = row_stride(padded(head.num_keys));
  const KeyRange range = keys_of_rows(head, block.row, block.rows);
  const bool is_adjusted = head.soft_cap > 0 || head.bias != nullptr;
  RowNumbers numbers;
  prepare_rows(head, block, numbers);
  copy_rows(block.q, block.q_stride, block.rows, head.head_size, s.queries, depth);
  copy_rows(block.grad, block.grad_stride, block.rows, head.head_size, s.grads, depth);
  pair_rows(s.queries, depth, width, depth, s.query_pairs, depth);
  pair_rows(s.grads, depth, width, depth, s.grad_pairs, depth);
  transpose_words(reinterpret_cast<const std::uint32_t*>(s.queries), depth / 2, width, depth / 2, s.queries_transposed,
                  width);
  transpose_words(reinterpret_cast<const std::uint32_t*>(s.grads), depth / 2, width, depth / 2, s.grads_transposed,
                  width);
  for (std::int64_t key = range.first; key < range.end; key += kBlock) {
    multiply({keys.keys + key * depth, depth, s.queries_transposed, width, s.scores, width, kBlock, width, depth});
    multiply(
        {keys.values + key * depth, depth, s.grads_transposed, width, s.d_probabilities, width, kBlock, width, depth});
    if (is_adjusted || key < head.reach.first_key(block.row + block.rows - 1))
      differentiate<true>(head, block, numbers, key, width, s);
    else
      differentiate<false>(head, block, numbers, key, width, s);
    multiply(
        {s.probabilities, width, s.grad_pairs, depth, keys.d_values + key * depth, depth, kBlock, depth, width, true});
    multiply(
        {s.d_scores_rows, width, s.query_pairs, depth, keys.d_keys + key * depth, depth, kBlock, depth, width, true});
    pair_rows(s.d_scores_rows, width, kBlock, width, s.d_scores + key / 2 * width, width);
  }
  multiply({keys.keys_transposed + range.first, stride, s.d_scores + range.first / 2 * width, width, s.d_queries, width,
            depth, width, range.end - range.first});
  transpose_words(reinterpret_cast<const std::uint32_t*>(s.d_queries), width, depth, width,
                  reinterpret_cast<std::uint32_t*>(s.d_query_rows), depth);
  store_block({s.d_query_rows, depth, block.rows, head.head_size}, {block.d_q, block.d_q_stride});
}

}  // namespace shardtune::bf16
