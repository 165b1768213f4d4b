#include "kernels/short_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "kernels/attention_hooks.hpp"
#include "kernels/element_type.hpp"
#include "kernels/short_attention_tiles.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

using simd::Int;

constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

// x where the lane's index is below `count`, else `other`.
SHARDTUNE_INLINE Float keep_lanes(const Float& x, std::int64_t count, float other) {
  const Int lane{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const Float rest = simd::broadcast(other);
  return lane < static_cast<std::int32_t>(std::clamp<std::int64_t>(count, 0, kLanes)) ? x : rest;
}

SHARDTUNE_INLINE float largest_lane(const Float& x) {
  float best = x[0];
  for (std::int64_t i = 1; i < kLanes; ++i) best = std::max(best, x[i]);
  return best;
}

// Scores of one row (already scaled) -> probabilities; columns from `valid` on get 0. Returns log(sum(exp(scores))).
SHARDTUNE_INLINE float softmax_row(float* row, std::int64_t columns, std::int64_t valid) {
  Float most = simd::broadcast(kMinusInfinity);
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const Float x = keep_lanes(simd::load(row + j), valid - j, kMinusInfinity);
    most = x > most ? x : most;
  }
  const float maximum = largest_lane(most);
  Float total{};
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const Float p = keep_lanes(simd::exp_non_positive(simd::load(row + j) - maximum), valid - j, 0.0F);
    total += p;
    simd::store(row + j, p);
  }
  const double sum = simd::sum_lanes(total);
  const auto inverse = static_cast<float>(1.0 / sum);
  for (std::int64_t j = 0; j < columns; j += kLanes) simd::store(row + j, simd::load(row + j) * inverse);
  return maximum + static_cast<float>(std::log(sum));
}

// What a task needs to know of the whole operation. The passes are compiled twice, with is_hooked and without: even
// idle branches on it cost some percent of the short segments' time.
struct Problem {
  std::int64_t num_heads, num_kv_heads, head_size;
  float scale, soft_cap;
  Reach reach;
  DropoutSite dropout;
  std::vector<std::pair<std::int64_t, std::int64_t>> segments;  // [begin, end) of the short ones
  std::int64_t longest = 0;
  bool is_hooked = false;
  std::optional<DistanceTable> bias;

  Problem(const at::Tensor& q, const at::Tensor& k, const AttentionOptions& options)
      : num_heads(q.size(1)),
        num_kv_heads(k.size(1)),
        head_size(q.size(2)),
        scale(static_cast<float>(options.scale)),
        soft_cap(static_cast<float>(options.soft_cap)),
        reach(reach_of(options)),
        dropout(options.dropout) {
    const auto& offsets = *options.segment_offsets;
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const std::int64_t length = offsets[s + 1] - offsets[s];
      if (length > kShortSegment) continue;
      segments.emplace_back(offsets[s], offsets[s + 1]);
      longest = std::max(longest, length);
    }
    if (segments.empty()) return;
    is_hooked = has_hooks(options, longest);
    if (options.relative_bias.defined()) bias.emplace(options.relative_bias, longest);
  }
  std::int64_t heads_per_kv() const { return num_heads / num_kv_heads; }
  std::int64_t num_tasks() const { return static_cast<std::int64_t>(segments.size()) * num_kv_heads; }
  // Columns [first, end) that a block of query rows [row, row + rows) of a segment of n tokens looks at.
  std::int64_t first_column(std::int64_t row) const { return reach.first_key(row) / kLanes * kLanes; }
  std::int64_t end_column(std::int64_t row, std::int64_t rows, std::int64_t n) const {
    return padded(reach.end_key(row + rows - 1, n));
  }
};

// Columns of one row, multiples of kLanes apart from `valid`: from there on no key is seen.
struct Columns {
  std::int64_t row, head, first, end, valid;
};

// Cap, bias and the window's near end on one row of scores, in place. slope: gets the cap's derivative; null without a
// cap and where it is not wanted.
SHARDTUNE_INLINE void adjust_scores(const Problem& p, const Columns& c, float* scores, float* slope) {
  if (p.soft_cap > 0)
    for (std::int64_t j = c.first; j < c.end; j += kLanes) {
      const Float t = simd::tanh(simd::load(scores + j) / p.soft_cap);
      simd::store(scores + j, t * p.soft_cap);
      if (slope != nullptr) simd::store(slope + j, 1.0F - t * t);
    }
  if (p.bias.has_value()) {
    const float* bias = p.bias->of_head(c.head) - c.row;
    for (std::int64_t j = c.first; j < c.end; j += kLanes)
      simd::store(scores + j, simd::load(scores + j) + simd::load(bias + j));
  }
  std::fill(scores + c.first, scores + std::max(c.first, p.reach.first_key(c.row)), kMinusInfinity);
}

// From the gradient of one row of scores to its share of the bias's (d_bias: distance 0; null without one) and to the
// gradient of the scores before the cap.
SHARDTUNE_INLINE void adjust_gradient(const Columns& c, const float* slope, float* d_scores, float* d_bias) {
  if (d_bias != nullptr)
    for (std::int64_t j = c.first; j < c.end; j += kLanes)
      simd::store(d_bias + j - c.row, simd::load(d_bias + j - c.row) + simd::load(d_scores + j));
  if (slope != nullptr)
    for (std::int64_t j = c.first; j < c.end; j += kLanes)
      simd::store(d_scores + j, simd::load(d_scores + j) * simd::load(slope + j));
}

// The multipliers of dropout of one row of the segment that starts at `begin`.
void fill_mask(const Problem& p, std::int64_t begin, const Columns& c, float* into) {
  fill_dropout_row(p.dropout, dropout_row_of(begin + c.row, c.head),
                   std::span<float>(into + c.first, static_cast<std::size_t>(c.end - c.first)),
                   static_cast<std::uint64_t>(c.first));
}

// Consecutive pieces of one thread's working memory.
class Scratch {
 public:
  explicit Scratch(std::int64_t size) : memory_(static_cast<std::size_t>(size)) {}
  void reset() { used_ = 0; }
  float* take(std::int64_t size) {
    float* piece = memory_.data() + used_;
    used_ += size;
    return piece;
  }

 private:
  std::vector<float> memory_;
  std::int64_t used_ = 0;
};

template <class Task>
void for_each_task(const Problem& p, std::int64_t scratch_size, const Task& task) {
  at::parallel_for(0, p.num_tasks(), 1, [&](std::int64_t first, std::int64_t last) {
    Scratch scratch(scratch_size);
    for (std::int64_t i = first; i < last; ++i) {
      scratch.reset();
      task(p.segments[static_cast<std::size_t>(i / p.num_kv_heads)], i % p.num_kv_heads, scratch);
    }
  });
}

// Rows of one head in [T, heads, D].
template <class T>
struct HeadRows {
  T* data;
  std::int64_t stride;
};
template <class T>
HeadRows<const T> rows_of(const at::Tensor& x, std::int64_t token, std::int64_t head) {
  return {x.const_data_ptr<T>() + token * x.stride(0) + head * x.stride(1), x.stride(0)};
}
template <class T>
HeadRows<T> mutable_rows_of(at::Tensor& x, std::int64_t token, std::int64_t head) {
  return {x.mutable_data_ptr<T>() + token * x.stride(0) + head * x.stride(1), x.stride(0)};
}

struct Forward {
  const at::Tensor &q, &k, &v;
  at::Tensor &out, &log_sum_exp;
};

template <class T, bool kIsHooked>
SHARDTUNE_INLINE void forward_task(const Problem& p, const Forward& io, std::int64_t begin, std::int64_t n,
                                   std::int64_t kv_head, Scratch& scratch) {
  const std::int64_t size = p.head_size, wide = padded(size), high = padded(n);
  float *keys = scratch.take(n * wide), *keys_t = scratch.take(size * high), *values = scratch.take(n * wide),
        *queries = scratch.take(n * wide);
  float *scores = scratch.take(kRows * high), *mask = scratch.take(high), *mixed = scratch.take(kRows * wide);
  const auto k_rows = rows_of<T>(io.k, begin, kv_head), v_rows = rows_of<T>(io.v, begin, kv_head);
  load_rows(k_rows.data, k_rows.stride, n, size, keys);
  load_rows(v_rows.data, v_rows.stride, n, size, values);
  transpose(keys, n, size, keys_t);
  for (std::int64_t head = kv_head * p.heads_per_kv(); head < (kv_head + 1) * p.heads_per_kv(); ++head) {
    const auto q_rows = rows_of<T>(io.q, begin, head);
    load_rows(q_rows.data, q_rows.stride, n, size, queries);
    for (std::int64_t i = 0; i < n * wide; i += kLanes) simd::store(queries + i, simd::load(queries + i) * p.scale);
    const auto out_rows = mutable_rows_of<T>(io.out, begin, head);
    for (std::int64_t row = 0; row < n; row += kRows) {
      const std::int64_t rows = std::min(kRows, n - row), first = kIsHooked ? p.first_column(row) : 0,
                         end = p.end_column(row, rows, n);
      std::fill(scores, scores + kRows * high, 0.0F);
      std::fill(mixed, mixed + kRows * wide, 0.0F);
      multiply_add({queries + row * wide, wide, 1}, keys_t + first, high, scores + first, high, rows, end - first,
                   size);
      for (std::int64_t r = 0; r < rows; ++r) {
        float* line = scores + r * high;
        const Columns c{row + r, head, first, end, p.reach.end_key(row + r, n)};
        if constexpr (kIsHooked) adjust_scores(p, c, line, nullptr);
        io.log_sum_exp.mutable_data_ptr<float>()[(begin + row + r) * p.num_heads + head] =
            softmax_row(line + first, end - first, c.valid - first);
        if (!p.dropout.is_active()) continue;
        fill_mask(p, begin, c, mask);
        for (std::int64_t j = first; j < end; j += kLanes)
          simd::store(line + j, simd::load(line + j) * simd::load(mask + j));
      }
      multiply_add({scores + first, high, 1}, values + first * wide, wide, mixed, wide, rows, wide,
                   std::min(end, n) - first);
      for (std::int64_t r = 0; r < rows; ++r)
        store_row(mixed + r * wide, size, out_rows.data + (row + r) * out_rows.stride);
    }
  }
}

struct Backward {
  const at::Tensor &grad, &q, &k, &v, &log_sum_exp;
  const AttentionGradients& into;
};

// Turns scores into probabilities times dropout (`scores`) and d_p into the gradient of the scores (`d_p`), in place.
SHARDTUNE_INLINE void backward_row(float* scores, float* d_p, const float* mask, float log_sum_exp, const Columns& c) {
  Float dot{};
  for (std::int64_t j = c.first; j < c.end; j += kLanes) {
    const Float p = keep_lanes(simd::exp_non_positive(simd::load(scores + j) - log_sum_exp), c.valid - j, 0.0F);
    const Float g = mask != nullptr ? simd::load(d_p + j) * simd::load(mask + j) : simd::load(d_p + j);
    dot += p * g;
    simd::store(scores + j, p);
    simd::store(d_p + j, g);
  }
  const auto mean = static_cast<float>(simd::sum_lanes(dot));
  for (std::int64_t j = c.first; j < c.end; j += kLanes) {
    const Float p = simd::load(scores + j);
    simd::store(d_p + j, p * (simd::load(d_p + j) - mean));
    if (mask != nullptr) simd::store(scores + j, p * simd::load(mask + j));
  }
}

// Working memory of one backward task, all fp32: [n, wide] unless noted.
struct BackwardBuffers {
  float *keys, *keys_t, *values_t, *queries, *grads, *d_keys, *d_values;  // *_t: [D, high]
  float *scores, *d_p, *mask, *slope, *d_query, *d_bias;  // [kRows, high] twice, a row twice, [kRows, wide], distances

  BackwardBuffers(Scratch& scratch, std::int64_t n, std::int64_t size) {
    const std::int64_t wide = padded(size), high = padded(n);
    for (float** piece : {&keys, &queries, &grads, &d_keys, &d_values}) *piece = scratch.take(n * wide);
    for (float** piece : {&keys_t, &values_t}) *piece = scratch.take(size * high);
    for (float** piece : {&scores, &d_p}) *piece = scratch.take(kRows * high);
    for (float** piece : {&mask, &slope}) *piece = scratch.take(high);
    d_query = scratch.take(kRows * wide);
    d_bias = scratch.take(DistanceTable::row_size(n));
  }
  static std::int64_t size_for(std::int64_t n, std::int64_t size) {
    const std::int64_t wide = padded(size), high = padded(n);
    return 5 * n * wide + 2 * size * high + (2 * kRows + 2) * high + kRows * wide + DistanceTable::row_size(n);
  }
};

template <class T, bool kIsHooked>
SHARDTUNE_INLINE void backward_head(const Problem& p, const Backward& io, std::int64_t begin, std::int64_t n,
                                    std::int64_t head, BackwardBuffers& b) {
  const std::int64_t size = p.head_size, wide = padded(size), high = padded(n);
  const auto q_rows = rows_of<T>(io.q, begin, head), g_rows = rows_of<T>(io.grad, begin, head);
  load_rows(q_rows.data, q_rows.stride, n, size, b.queries);
  for (std::int64_t i = 0; i < n * wide; i += kLanes) simd::store(b.queries + i, simd::load(b.queries + i) * p.scale);
  load_rows(g_rows.data, g_rows.stride, n, size, b.grads);
  const auto out_rows = mutable_rows_of<T>(io.into.q, begin, head);
  float* slope = kIsHooked && p.soft_cap > 0 ? b.slope : nullptr;
  float* d_bias = kIsHooked && p.bias.has_value() ? b.d_bias + DistanceTable::origin(n) : nullptr;
  std::fill(b.d_bias, b.d_bias + (d_bias != nullptr ? DistanceTable::row_size(n) : 0), 0.0F);
  for (std::int64_t row = 0; row < n; row += kRows) {
    const std::int64_t rows = std::min(kRows, n - row), first = kIsHooked ? p.first_column(row) : 0,
                       end = p.end_column(row, rows, n), looked_at = std::min(end, n) - first;
    std::fill(b.scores, b.scores + kRows * high, 0.0F);
    std::fill(b.d_p, b.d_p + kRows * high, 0.0F);
    std::fill(b.d_query, b.d_query + kRows * wide, 0.0F);
    multiply_add({b.queries + row * wide, wide, 1}, b.keys_t + first, high, b.scores + first, high, rows, end - first,
                 size);
    multiply_add({b.grads + row * wide, wide, 1}, b.values_t + first, high, b.d_p + first, high, rows, end - first,
                 size);
    for (std::int64_t r = 0; r < rows; ++r) {
      const Columns c{row + r, head, first, end, p.reach.end_key(row + r, n)};
      if constexpr (kIsHooked) adjust_scores(p, c, b.scores + r * high, slope);
      if (p.dropout.is_active()) fill_mask(p, begin, c, b.mask);
      backward_row(b.scores + r * high, b.d_p + r * high, p.dropout.is_active() ? b.mask : nullptr,
                   io.log_sum_exp.const_data_ptr<float>()[(begin + row + r) * p.num_heads + head], c);
      if constexpr (kIsHooked) adjust_gradient(c, slope, b.d_p + r * high, d_bias);
    }
    multiply_add({b.scores + first, 1, high}, b.grads + row * wide, wide, b.d_values + first * wide, wide, looked_at,
                 wide, rows);
    multiply_add({b.d_p + first, 1, high}, b.queries + row * wide, wide, b.d_keys + first * wide, wide, looked_at, wide,
                 rows);  // queries hold the scale
    multiply_add({b.d_p + first, high, 1}, b.keys + first * wide, wide, b.d_query, wide, rows, wide, looked_at);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t d = 0; d < wide; d += kLanes)
        simd::store(b.d_query + r * wide + d, simd::load(b.d_query + r * wide + d) * p.scale);
      store_row(b.d_query + r * wide, size, out_rows.data + (row + r) * out_rows.stride);
    }
  }
  if (d_bias != nullptr) std::copy(d_bias - (n - 1), d_bias + n, diagonals_of(*io.into.diagonal_sums, head, begin));
}

template <class T, bool kIsHooked>
SHARDTUNE_INLINE void backward_task(const Problem& p, const Backward& io, std::int64_t begin, std::int64_t n,
                                    std::int64_t kv_head, Scratch& scratch) {
  const std::int64_t size = p.head_size, wide = padded(size);
  BackwardBuffers b(scratch, n, size);
  const auto k_rows = rows_of<T>(io.k, begin, kv_head), v_rows = rows_of<T>(io.v, begin, kv_head);
  load_rows(v_rows.data, v_rows.stride, n, size, b.keys);  // borrowed for a moment
  transpose(b.keys, n, size, b.values_t);
  load_rows(k_rows.data, k_rows.stride, n, size, b.keys);
  transpose(b.keys, n, size, b.keys_t);
  std::fill(b.d_keys, b.d_keys + n * wide, 0.0F);
  std::fill(b.d_values, b.d_values + n * wide, 0.0F);
  for (std::int64_t head = kv_head * p.heads_per_kv(); head < (kv_head + 1) * p.heads_per_kv(); ++head)
    backward_head<T, kIsHooked>(p, io, begin, n, head, b);
  const auto dk_rows = mutable_rows_of<T>(io.into.k, begin, kv_head),
             dv_rows = mutable_rows_of<T>(io.into.v, begin, kv_head);
  for (std::int64_t t = 0; t < n; ++t) {
    store_row(b.d_keys + t * wide, size, dk_rows.data + t * dk_rows.stride);
    store_row(b.d_values + t * wide, size, dv_rows.data + t * dv_rows.stride);
  }
}

template <class T, bool kIsHooked>
void forward_all(const Problem& p, const Forward& io) {
  const std::int64_t wide = padded(p.head_size), high = padded(p.longest);
  for_each_task(p, 3 * high * wide + p.head_size * high + (kRows + 1) * high + kRows * wide,
                [&](const std::pair<std::int64_t, std::int64_t>& segment, std::int64_t kv_head, Scratch& scratch) {
                  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
                    forward_task<T, kIsHooked>(p, io, segment.first, segment.second - segment.first, kv_head, scratch);
                  });
                });
}

template <class T, bool kIsHooked>
void backward_all(const Problem& p, const Backward& io) {
  for_each_task(p, BackwardBuffers::size_for(p.longest, p.head_size),
                [&](const std::pair<std::int64_t, std::int64_t>& segment, std::int64_t kv_head, Scratch& scratch) {
                  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
                    backward_task<T, kIsHooked>(p, io, segment.first, segment.second - segment.first, kv_head, scratch);
                  });
                });
}

}  // namespace

void short_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const AttentionOptions& options, at::Tensor& out, at::Tensor& log_sum_exp) {
  const Problem problem(q, k, options);
  const Forward io{q, k, v, out, log_sum_exp};
  with_element_type(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (problem.is_hooked) return forward_all<T, true>(problem, io);
    forward_all<T, false>(problem, io);
  });
}

void short_attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& log_sum_exp, const AttentionOptions& options,
                              const AttentionGradients& into) {
  const Problem problem(q, k, options);
  const Backward io{grad, q, k, v, log_sum_exp, into};
  with_element_type(q.scalar_type(), [&](auto element) {
    using T = decltype(element);
    if (problem.is_hooked) return backward_all<T, true>(problem, io);
    backward_all<T, false>(problem, io);
  });
}

}  // namespace shardtune
