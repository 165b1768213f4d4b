#include "kernels/bf16_attention.hpp"

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <span>
#include <utility>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "kernels/attention_hooks.hpp"
#include "kernels/bf16_attention_block.hpp"
#include "kernels/bf16_tiles.hpp"

namespace shardtune {
namespace {

using bf16::padded;
using Number = std::uint16_t;
using Words = std::vector<std::uint64_t>;

struct Task {
  std::int64_t begin, end, kv_head;
};

// What all tasks need to know.
struct Problem {
  std::int64_t num_heads, num_kv_heads, head_size, longest = 0;
  double scale, soft_cap;
  Reach reach;
  DropoutSite dropout;
  std::vector<Task> tasks;  // longest first
  std::optional<DistanceTable> bias;

  Problem(const at::Tensor& q, const at::Tensor& k, const AttentionOptions& options)
      : num_heads(q.size(1)),
        num_kv_heads(k.size(1)),
        head_size(q.size(2)),
        scale(options.scale),
        soft_cap(options.soft_cap),
        reach(reach_of(options)),
        dropout(options.dropout) {
    const auto& offsets = *options.segment_offsets;
    for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
      longest = std::max(longest, offsets[s + 1] - offsets[s]);
      for (std::int64_t head = 0; head < num_kv_heads; ++head) tasks.push_back({offsets[s], offsets[s + 1], head});
    }
    std::stable_sort(tasks.begin(), tasks.end(),
                     [](const Task& a, const Task& b) { return a.end - a.begin > b.end - b.begin; });
    if (options.relative_bias.defined()) bias.emplace(options.relative_bias, longest);
  }
  std::int64_t heads_per_kv() const { return num_heads / num_kv_heads; }
  bf16::HeadView view(const Task& task, std::int64_t head) const {
    return {.num_keys = task.end - task.begin,
            .head_size = head_size,
            .reach = reach,
            .scale = static_cast<float>(scale),
            .keep_scale = dropout.is_active() ? dropout_keep_scale(dropout) : 1.0F,
            .soft_cap = static_cast<float>(soft_cap),
            .bias = bias.has_value() ? bias->of_head(head) : nullptr};
  }
};

// One head of [T, heads, D] from a token on.
struct Rows {
  Number* data;
  std::int64_t stride;
  Number* at(std::int64_t row) const { return data + row * stride; }
};
struct ConstRows {
  const Number* data;
  std::int64_t stride;
  const Number* at(std::int64_t row) const { return data + row * stride; }
};
ConstRows rows_of(const at::Tensor& x, std::int64_t token, std::int64_t head) {
  return {reinterpret_cast<const Number*>(x.const_data_ptr<c10::BFloat16>()) + token * x.stride(0) + head * x.stride(1),
          x.stride(0)};
}
Rows mutable_rows_of(at::Tensor& x, std::int64_t token, std::int64_t head) {
  return {reinterpret_cast<Number*>(x.mutable_data_ptr<c10::BFloat16>()) + token * x.stride(0) + head * x.stride(1),
          x.stride(0)};
}

// Consecutive aligned pieces of one thread's working memory; measured first, then taken: `place` is called for both.
class Scratch {
 public:
  template <class T>
  void take(T*& piece, std::int64_t size) {
    if (memory_.defined()) piece = reinterpret_cast<T*>(memory_.mutable_data_ptr<std::uint8_t>() + used_);
    used_ += (size * static_cast<std::int64_t>(sizeof(T)) + 63) / 64 * 64;
  }
  template <class Place>
  explicit Scratch(const Place& place) {
    place(*this);
    memory_ = at::empty({used_}, at::kByte);  // aligned to 64 bytes
    used_ = 0;
    place(*this);
  }

 private:
  at::Tensor memory_;
  std::int64_t used_ = 0;
};

// work() on every thread; it returns a function that does one task.
template <class Work>
void share_tasks(const Problem& problem, const Work& work) {
  std::atomic<std::size_t> next{0};
  at::parallel_for(0, std::min<std::int64_t>(at::get_num_threads(), static_cast<std::int64_t>(problem.tasks.size())), 1,
                   [&](std::int64_t first, std::int64_t last) {
                     if (first == last) return;
                     const bf16::TileSession session;
                     const auto run = work();
                     for (std::size_t i = next++; i < problem.tasks.size(); i = next++) run(problem.tasks[i]);
                   });
}

// --- dropout
// -----------------------------------------------------------------------------------------------------------

// Words of bits for the keys that a block of rows looks at.
std::int64_t num_words(const bf16::KeyRange& keys) { return (keys.end - keys.first + 63) / 64; }

// One row of bits for each query row of a block: bit i of word w = key (first + 64 w + i) is kept. token: of the first
// row.
void fill_keep_rows(const Problem& p, std::int64_t token, std::int64_t rows, std::int64_t head,
                    const bf16::KeyRange& keys, Words& keep) {
  const auto stride = static_cast<std::size_t>(num_words(keys));
  keep.resize(static_cast<std::size_t>(bf16::kBackwardRows) * stride);
  for (std::int64_t r = 0; r < rows; ++r)
    fill_dropout_bits(p.dropout, dropout_row_of(token + r, head),
                      std::span<std::uint64_t>(keep).subspan(static_cast<std::size_t>(r) * stride, stride),
                      static_cast<std::uint64_t>(keys.first));
}

// Bit c of word r <-> bit r of word c (Warren, Hacker's Delight, 7-3).
void transpose_bits(std::uint64_t (&words)[64]) {
  std::uint64_t mask = 0x00000000FFFFFFFFULL;
  for (unsigned width = 32; width != 0; width >>= 1U, mask ^= mask << width)
    for (unsigned i = 0; i < 64; i = (i + width + 1U) & ~width) {
      const std::uint64_t change = ((words[i] >> width) ^ words[i + width]) & mask;
      words[i + width] ^= change;
      words[i] ^= change << width;
    }
}

// From rows of queries, as above, to one word for each key: bit i = query i of the block keeps it.
void keys_of_keep_rows(const Words& rows, std::int64_t stride, std::int64_t num_rows, Words& keys) {
  keys.resize(static_cast<std::size_t>(stride * 64));
  for (std::int64_t group = 0; group < stride; ++group) {
    std::uint64_t block[64] = {};
    for (std::int64_t r = 0; r < num_rows; ++r) block[r] = rows[static_cast<std::size_t>(r * stride + group)];
    transpose_bits(block);
    std::copy_n(block, 64, keys.begin() + group * 64);
  }
}

// --- forward
// -----------------------------------------------------------------------------------------------------------

struct Forward {
  const at::Tensor &q, &k, &v;
  at::Tensor &out, &log_sum_exp;
};

struct ForwardMemory {
  Number* rows = nullptr;
  std::uint32_t *key_panels = nullptr, *value_pairs = nullptr;
  bf16::ForwardScratch block{};
  Words keep;
  Scratch scratch;

  explicit ForwardMemory(const Problem& p)
      : scratch([&](Scratch& s) {
          const std::int64_t keys = padded(p.longest), depth = padded(p.head_size), stride = bf16::row_stride(keys);
          s.take(rows, keys * depth);
          s.take(key_panels, keys * depth / 2);
          s.take(value_pairs, keys * depth / 2);
          s.take(block.queries, bf16::kForwardRows * depth);
          s.take(block.probabilities, bf16::kForwardRows * stride);
          s.take(block.scores, bf16::kForwardRows * stride);
          s.take(block.mixed, bf16::kForwardRows * depth);
        }) {}
  ForwardMemory(const ForwardMemory&) = delete;
  ForwardMemory& operator=(const ForwardMemory&) = delete;
};

void forward_task(const Problem& p, const Forward& io, const Task& task, ForwardMemory& memory) {
  const std::int64_t heads = p.heads_per_kv(), n = task.end - task.begin;
  const ConstRows k = rows_of(io.k, task.begin, task.kv_head), v = rows_of(io.v, task.begin, task.kv_head);
  bf16::pack_forward_keys(p.view(task, 0), k.data, k.stride, v.data, v.stride, memory.rows, memory.key_panels,
                          memory.value_pairs);
  auto* log_sum_exp = io.log_sum_exp.mutable_data_ptr<float>();
  for (std::int64_t head = task.kv_head * heads; head < (task.kv_head + 1) * heads; ++head) {
    const bf16::HeadView view = p.view(task, head);
    const ConstRows q = rows_of(io.q, task.begin, head);
    const Rows out = mutable_rows_of(io.out, task.begin, head);
    for (std::int64_t row = 0; row < n; row += bf16::kForwardRows) {
      const std::int64_t rows = std::min(bf16::kForwardRows, n - row);
      const bf16::KeyRange keys = bf16::keys_of_rows(view, row, rows);
      if (p.dropout.is_active()) fill_keep_rows(p, task.begin + row, rows, head, keys, memory.keep);
      bf16::forward_block(view, {memory.key_panels, memory.value_pairs},
                          {.row = row,
                           .rows = rows,
                           .q = q.at(row),
                           .q_stride = q.stride,
                           .keep = p.dropout.is_active() ? memory.keep.data() : nullptr,
                           .keep_stride = num_words(keys),
                           .out = out.at(row),
                           .out_stride = out.stride,
                           .log_sum_exp = log_sum_exp + (task.begin + row) * p.num_heads + head,
                           .log_sum_exp_stride = p.num_heads},
                          memory.block);
    }
  }
}

// --- backward
// ----------------------------------------------------------------------------------------------------------

struct BackwardMemory {
  bf16::BackwardKeys keys{};
  std::uint32_t* words = nullptr;
  float* d_bias = nullptr;  // as DistanceTable
  bf16::BackwardScratch block{};
  Words keep_rows, keep_keys;
  Scratch scratch;

  explicit BackwardMemory(const Problem& p)
      : scratch([&](Scratch& s) {
          const std::int64_t n = padded(p.longest), depth = padded(p.head_size), rows = bf16::kBackwardRows;
          for (Number** piece : {&keys.keys, &keys.values}) s.take(*piece, n * depth);
          s.take(keys.keys_transposed, depth * bf16::row_stride(n));
          for (float** piece : {&keys.d_keys, &keys.d_values}) s.take(*piece, n * depth);
          s.take(words, n / 2 * depth);
          if (p.bias.has_value()) s.take(d_bias, DistanceTable::row_size(p.longest));
          for (Number** piece : {&block.queries, &block.grads}) s.take(*piece, rows * depth);
          for (Number** piece : {&block.probabilities, &block.d_scores_rows}) s.take(*piece, bf16::kBlock * rows);
          for (std::uint32_t** piece :
               {&block.query_pairs, &block.grad_pairs, &block.queries_transposed, &block.grads_transposed})
            s.take(*piece, rows * depth / 2);
          s.take(block.d_scores, n / 2 * rows);
          for (float** piece : {&block.scores, &block.d_probabilities}) s.take(*piece, bf16::kBlock * rows);
          for (float** piece : {&block.d_queries, &block.d_query_rows}) s.take(*piece, rows * depth);
        }) {}
  BackwardMemory(const BackwardMemory&) = delete;
  BackwardMemory& operator=(const BackwardMemory&) = delete;
};

void backward_head(const Problem& p, const AttentionSaved& saved, const Task& task, std::int64_t head,
                   const AttentionGradients& gradients, BackwardMemory& memory) {
  const bf16::HeadView view = p.view(task, head);
  const std::int64_t n = view.num_keys;
  const ConstRows q = rows_of(saved.q, task.begin, head), grad = rows_of(saved.grad, task.begin, head),
                  out = rows_of(saved.out, task.begin, head);
  const Rows into = mutable_rows_of(gradients.q, task.begin, head);
  const auto* log_sum_exp = saved.log_sum_exp.const_data_ptr<float>();
  float* d_bias = p.bias.has_value() ? memory.d_bias + DistanceTable::origin(n) : nullptr;
  if (d_bias != nullptr) std::fill_n(memory.d_bias, DistanceTable::row_size(n), 0.0F);
  for (std::int64_t row = 0; row < n; row += bf16::kBackwardRows) {
    const std::int64_t rows = std::min(bf16::kBackwardRows, n - row);
    const bf16::KeyRange keys = bf16::keys_of_rows(view, row, rows);
    if (p.dropout.is_active()) {
      fill_keep_rows(p, task.begin + row, rows, head, keys, memory.keep_rows);
      keys_of_keep_rows(memory.keep_rows, num_words(keys), rows, memory.keep_keys);
    }
    bf16::backward_block(view, memory.keys,
                         {.row = row,
                          .rows = rows,
                          .q = q.at(row),
                          .grad = grad.at(row),
                          .out = out.at(row),
                          .q_stride = q.stride,
                          .grad_stride = grad.stride,
                          .out_stride = out.stride,
                          .log_sum_exp = log_sum_exp + (task.begin + row) * p.num_heads + head,
                          .log_sum_exp_stride = p.num_heads,
                          .first_key = keys.first,
                          .keep = p.dropout.is_active() ? memory.keep_keys.data() : nullptr,
                          .d_q = into.at(row),
                          .d_q_stride = into.stride,
                          .d_bias = d_bias},
                         memory.block);
  }
  if (d_bias != nullptr)
    std::copy(d_bias - (n - 1), d_bias + n, diagonals_of(*gradients.diagonal_sums, head, task.begin));
}

void backward_task(const Problem& p, const AttentionSaved& saved, const Task& task, const AttentionGradients& into,
                   BackwardMemory& memory) {
  const bf16::HeadView view = p.view(task, 0);
  const ConstRows k = rows_of(saved.k, task.begin, task.kv_head), v = rows_of(saved.v, task.begin, task.kv_head);
  bf16::pack_backward_keys(view, k.data, k.stride, v.data, v.stride, memory.keys, memory.words);
  for (std::int64_t head = task.kv_head * p.heads_per_kv(); head < (task.kv_head + 1) * p.heads_per_kv(); ++head)
    backward_head(p, saved, task, head, into, memory);
  const Rows d_k = mutable_rows_of(into.k, task.begin, task.kv_head),
             d_v = mutable_rows_of(into.v, task.begin, task.kv_head);
  const std::int64_t depth = padded(view.head_size);
  bf16::store_block({memory.keys.d_keys, depth, view.num_keys, view.head_size}, {d_k.data, d_k.stride});
  bf16::store_block({memory.keys.d_values, depth, view.num_keys, view.head_size}, {d_v.data, d_v.stride},
                    view.keep_scale);
}

}  // namespace

void bf16_attention_forward(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                            const AttentionOptions& options, at::Tensor& out, at::Tensor& log_sum_exp) {
  const Problem problem(q, k, options);
  const Forward io{q, k, v, out, log_sum_exp};
  share_tasks(problem, [&] {
    return [&, memory = std::make_unique<ForwardMemory>(problem)](const Task& task) {
      forward_task(problem, io, task, *memory);
    };
  });
}

void bf16_attention_backward(const AttentionSaved& saved, const AttentionOptions& options,
                             const AttentionGradients& into) {
  const Problem problem(saved.q, saved.k, options);
  share_tasks(problem, [&] {
    return [&, memory = std::make_unique<BackwardMemory>(problem)](const Task& task) {
      backward_task(problem, saved, task, into, *memory);
    };
  });
}

}  // namespace shardtune
