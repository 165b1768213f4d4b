#include "kernels/short_attention.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <span>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "kernels/element_type.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

using simd::Float;
using simd::Int;
using simd::kLanes;

constexpr std::int64_t kRows = 4;  // query rows worked on together
constexpr float kMinusInfinity = -std::numeric_limits<float>::infinity();

std::int64_t padded(std::int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

// A matrix read element by element: a[m * row + k * column].
struct Strided {
  const float* data;
  std::int64_t row, column;
};

template <std::int64_t kM, std::int64_t kVectors>
SHARDTUNE_INLINE void multiply_tile(const Strided& a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                                    std::int64_t k_size) {
  Float sum[kM][kVectors];
  for (std::int64_t m = 0; m < kM; ++m)
    for (std::int64_t v = 0; v < kVectors; ++v) sum[m][v] = simd::load(c + m * ldc + v * kLanes);
  for (std::int64_t k = 0; k < k_size; ++k) {
    Float row[kVectors];
    for (std::int64_t v = 0; v < kVectors; ++v) row[v] = simd::load(b + k * ldb + v * kLanes);
    for (std::int64_t m = 0; m < kM; ++m) {
      const Float factor = simd::broadcast(a.data[m * a.row + k * a.column]);
      for (std::int64_t v = 0; v < kVectors; ++v) sum[m][v] += factor * row[v];
    }
  }
  for (std::int64_t m = 0; m < kM; ++m)
    for (std::int64_t v = 0; v < kVectors; ++v) simd::store(c + m * ldc + v * kLanes, sum[m][v]);
}

template <std::int64_t kM>
SHARDTUNE_INLINE void multiply_rows(const Strided& a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                                    std::int64_t n_size, std::int64_t k_size) {
  std::int64_t n = 0;
  for (; n + 2 * kLanes <= n_size; n += 2 * kLanes) multiply_tile<kM, 2>(a, b + n, ldb, c + n, ldc, k_size);
  if (n < n_size) multiply_tile<kM, 1>(a, b + n, ldb, c + n, ldc, k_size);
}

// c[m_size, n_size] += a b. b and c have dense rows; n_size is a multiple of kLanes. Terms are added in the order of k.
SHARDTUNE_INLINE void multiply_add(Strided a, const float* b, std::int64_t ldb, float* c, std::int64_t ldc,
                                   std::int64_t m_size, std::int64_t n_size, std::int64_t k_size) {
  std::int64_t m = 0;
  for (; m + kRows <= m_size; m += kRows)
    multiply_rows<kRows>({a.data + m * a.row, a.row, a.column}, b, ldb, c + m * ldc, ldc, n_size, k_size);
  for (; m < m_size; ++m)
    multiply_rows<1>({a.data + m * a.row, a.row, a.column}, b, ldb, c + m * ldc, ldc, n_size, k_size);
}

template <class T>
SHARDTUNE_INLINE void load_rows(const T* from, std::int64_t stride, std::int64_t rows, std::int64_t size, float* into) {
  for (std::int64_t t = 0; t < rows; ++t)
    for (std::int64_t d = 0; d < size; d += kLanes) {
      const T* at = from + t * stride + d;
      simd::store(into + t * padded(size) + d,
                  size - d >= kLanes ? simd::load(at) : simd::load_some(at, size - d, 0.0F));
    }
}

template <class T>
SHARDTUNE_INLINE void store_row(const float* from, std::int64_t size, T* into) {
  for (std::int64_t d = 0; d < size; d += kLanes) {
    if (size - d >= kLanes)
      simd::store(into + d, simd::load(from + d));
    else
      simd::store_some(into + d, simd::load(from + d), size - d);
  }
}

// [rows, padded(size)] -> [size, padded(rows)]
SHARDTUNE_INLINE void transpose(const float* from, std::int64_t rows, std::int64_t size, float* into) {
  const std::int64_t wide = padded(size), high = padded(rows);
  for (std::int64_t d = 0; d < size; ++d) {
    for (std::int64_t t = 0; t < rows; ++t) into[d * high + t] = from[t * wide + d];
    std::fill(into + d * high + rows, into + (d + 1) * high, 0.0F);
  }
}

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

// What a task needs to know of the whole operation.
struct Problem {
  std::int64_t num_heads, num_kv_heads, head_size;
  float scale;
  bool is_causal;
  DropoutSite dropout;
  std::vector<std::pair<std::int64_t, std::int64_t>> segments;  // [begin, end) of the short ones
  std::int64_t longest = 0;

  Problem(const at::Tensor& q, const at::Tensor& k, const AttentionOptions& options)
      : num_heads(q.size(1)),
        num_kv_heads(k.size(1)),
        head_size(q.size(2)),
        scale(static_cast<float>(options.scale)),
        is_causal(options.is_causal),
        dropout(options.dropout) {
    const auto& offsets = *options.segment_offsets;
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      const std::int64_t length = offsets[s + 1] - offsets[s];
      if (length > kShortSegment) continue;
      segments.emplace_back(offsets[s], offsets[s + 1]);
      longest = std::max(longest, length);
    }
  }
  std::int64_t heads_per_kv() const { return num_heads / num_kv_heads; }
  std::int64_t num_tasks() const { return static_cast<std::int64_t>(segments.size()) * num_kv_heads; }
  // Columns that a block of query rows [row, row + rows) of a segment of n tokens looks at.
  std::int64_t columns(std::int64_t row, std::int64_t rows, std::int64_t n) const {
    return padded(is_causal ? std::min(n, row + rows) : n);
  }
  std::int64_t valid(std::int64_t row, std::int64_t n) const { return is_causal ? row + 1 : n; }
};

// The multipliers of dropout of one row.
void fill_mask(const Problem& p, std::int64_t token, std::int64_t head, std::int64_t columns, float* into) {
  fill_dropout_row(p.dropout, dropout_row_of(token, head),
                   std::span<float>(into, static_cast<std::size_t>(columns)));
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

template <class T>
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
      const std::int64_t rows = std::min(kRows, n - row), columns = p.columns(row, rows, n);
      std::fill(scores, scores + kRows * high, 0.0F);
      std::fill(mixed, mixed + kRows * wide, 0.0F);
      multiply_add({queries + row * wide, wide, 1}, keys_t, high, scores, high, rows, columns, size);
      for (std::int64_t r = 0; r < rows; ++r) {
        float* line = scores + r * high;
        io.log_sum_exp.mutable_data_ptr<float>()[(begin + row + r) * p.num_heads + head] =
            softmax_row(line, columns, p.valid(row + r, n));
        if (!p.dropout.is_active()) continue;
        fill_mask(p, begin + row + r, head, columns, mask);
        for (std::int64_t j = 0; j < columns; j += kLanes)
          simd::store(line + j, simd::load(line + j) * simd::load(mask + j));
      }
      multiply_add({scores, high, 1}, values, wide, mixed, wide, rows, wide, std::min(columns, n));
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
SHARDTUNE_INLINE void backward_row(float* scores, float* d_p, const float* mask, float log_sum_exp,
                                   std::int64_t columns, std::int64_t valid) {
  Float dot{};
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const Float p = keep_lanes(simd::exp_non_positive(simd::load(scores + j) - log_sum_exp), valid - j, 0.0F);
    const Float g = mask != nullptr ? simd::load(d_p + j) * simd::load(mask + j) : simd::load(d_p + j);
    dot += p * g;
    simd::store(scores + j, p);
    simd::store(d_p + j, g);
  }
  const auto mean = static_cast<float>(simd::sum_lanes(dot));
  for (std::int64_t j = 0; j < columns; j += kLanes) {
    const Float p = simd::load(scores + j);
    simd::store(d_p + j, p * (simd::load(d_p + j) - mean));
    if (mask != nullptr) simd::store(scores + j, p * simd::load(mask + j));
  }
}

// Working memory of one backward task, all fp32: [n, wide] unless noted.
struct BackwardBuffers {
  float *keys, *keys_t, *values_t, *queries, *grads, *d_keys, *d_values;  // *_t: [D, high]
  float *scores, *d_p, *mask, *d_query;                                   // [kRows, high], one row, [kRows, wide]

  BackwardBuffers(Scratch& scratch, std::int64_t n, std::int64_t size) {
    const std::int64_t wide = padded(size), high = padded(n);
    for (float** piece : {&keys, &queries, &grads, &d_keys, &d_values}) *piece = scratch.take(n * wide);
    for (float** piece : {&keys_t, &values_t}) *piece = scratch.take(size * high);
    for (float** piece : {&scores, &d_p}) *piece = scratch.take(kRows * high);
    mask = scratch.take(high);
    d_query = scratch.take(kRows * wide);
  }
};

template <class T>
SHARDTUNE_INLINE void backward_head(const Problem& p, const Backward& io, std::int64_t begin, std::int64_t n,
                                    std::int64_t head, BackwardBuffers& b) {
  const std::int64_t size = p.head_size, wide = padded(size), high = padded(n);
  const auto q_rows = rows_of<T>(io.q, begin, head), g_rows = rows_of<T>(io.grad, begin, head);
  load_rows(q_rows.data, q_rows.stride, n, size, b.queries);
  for (std::int64_t i = 0; i < n * wide; i += kLanes) simd::store(b.queries + i, simd::load(b.queries + i) * p.scale);
  load_rows(g_rows.data, g_rows.stride, n, size, b.grads);
  const auto out_rows = mutable_rows_of<T>(io.into.q, begin, head);
  for (std::int64_t row = 0; row < n; row += kRows) {
    const std::int64_t rows = std::min(kRows, n - row), columns = p.columns(row, rows, n),
                       looked_at = std::min(columns, n);
    std::fill(b.scores, b.scores + kRows * high, 0.0F);
    std::fill(b.d_p, b.d_p + kRows * high, 0.0F);
    std::fill(b.d_query, b.d_query + kRows * wide, 0.0F);
    multiply_add({b.queries + row * wide, wide, 1}, b.keys_t, high, b.scores, high, rows, columns, size);
    multiply_add({b.grads + row * wide, wide, 1}, b.values_t, high, b.d_p, high, rows, columns, size);
    for (std::int64_t r = 0; r < rows; ++r) {
      if (p.dropout.is_active()) fill_mask(p, begin + row + r, head, columns, b.mask);
      backward_row(b.scores + r * high, b.d_p + r * high, p.dropout.is_active() ? b.mask : nullptr,
                   io.log_sum_exp.const_data_ptr<float>()[(begin + row + r) * p.num_heads + head], columns,
                   p.valid(row + r, n));
    }
    multiply_add({b.scores, 1, high}, b.grads + row * wide, wide, b.d_values, wide, looked_at, wide, rows);
    multiply_add({b.d_p, 1, high}, b.queries + row * wide, wide, b.d_keys, wide, looked_at, wide,
                 rows);  // queries hold the scale
    multiply_add({b.d_p, high, 1}, b.keys, wide, b.d_query, wide, rows, wide, looked_at);
    for (std::int64_t r = 0; r < rows; ++r) {
      for (std::int64_t d = 0; d < wide; d += kLanes)
        simd::store(b.d_query + r * wide + d, simd::load(b.d_query + r * wide + d) * p.scale);
      store_row(b.d_query + r * wide, size, out_rows.data + (row + r) * out_rows.stride);
    }
  }
}

template <class T>
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
    backward_head<T>(p, io, begin, n, head, b);
  const auto dk_rows = mutable_rows_of<T>(io.into.k, begin, kv_head),
             dv_rows = mutable_rows_of<T>(io.into.v, begin, kv_head);
  for (std::int64_t t = 0; t < n; ++t) {
    store_row(b.d_keys + t * wide, size, dk_rows.data + t * dk_rows.stride);
    store_row(b.d_values + t * wide, size, dv_rows.data + t * dv_rows.stride);
  }
}

template <class T>
void forward_all(const Problem& p, const Forward& io) {
  const std::int64_t wide = padded(p.head_size), high = padded(p.longest);
  for_each_task(p, 3 * high * wide + p.head_size * high + (kRows + 1) * high + kRows * wide,
                [&](const std::pair<std::int64_t, std::int64_t>& segment, std::int64_t kv_head, Scratch& scratch) {
                  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
                    forward_task<T>(p, io, segment.first, segment.second - segment.first, kv_head, scratch);
                  });
                });
}

template <class T>
void backward_all(const Problem& p, const Backward& io) {
  const std::int64_t wide = padded(p.head_size), high = padded(p.longest);
  for_each_task(p, 5 * high * wide + 2 * p.head_size * high + (2 * kRows + 1) * high + kRows * wide,
                [&](const std::pair<std::int64_t, std::int64_t>& segment, std::int64_t kv_head, Scratch& scratch) {
                  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
                    backward_task<T>(p, io, segment.first, segment.second - segment.first, kv_head, scratch);
                  });
                });
}

}  // namespace

void short_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                             const AttentionOptions& options, at::Tensor& out, at::Tensor& log_sum_exp) {
  const Problem problem(q, k, options);
  const Forward io{q, k, v, out, log_sum_exp};
  with_element_type(q.scalar_type(), [&](auto element) { forward_all<decltype(element)>(problem, io); });
}

void short_attention_backward(const at::Tensor& grad, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                              const at::Tensor& log_sum_exp, const AttentionOptions& options,
                              const AttentionGradients& into) {
  const Problem problem(q, k, options);
  const Backward io{grad, q, k, v, log_sum_exp, into};
  with_element_type(q.scalar_type(), [&](auto element) { backward_all<decltype(element)>(problem, io); });
}

}  // namespace shardtune
