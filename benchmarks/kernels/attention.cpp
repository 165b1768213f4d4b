// Attention over segments of one row, q, k and v in one tensor as a fused projection makes them. ATen takes equal
// segments as a batch, unequal ones in turn, a sliding window as a mask of all pairs.
#include <cmath>
#include <memory>
#include <optional>
#include <utility>

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "benchmarks/kernels/comparison.hpp"
#include "kernels/attention.hpp"

namespace shardtune::measurement {
namespace {

struct Shape {
  std::string segments;  // for the name
  std::vector<std::int64_t> lengths;
  std::int64_t heads, kv_heads, size;
  bool is_causal;
  double dropout = 0;
  std::int64_t window = 0;  // causal only
};

std::vector<std::int64_t> equal(std::int64_t count, std::int64_t length) {
  return std::vector<std::int64_t>(static_cast<std::size_t>(count), length);
}

// Two products over the pairs of a query and a key it sees; five in the backward pass, which makes the scores again
// (counted as by FlashAttention).
double flops_of_forward(const Shape& shape) {
  double pairs = 0;
  for (const std::int64_t n : shape.lengths) {
    const std::int64_t beyond = shape.window > 0 && shape.window < n ? n - shape.window : 0;  // hidden: a triangle
    pairs += static_cast<double>(shape.is_causal ? n * (n + 1) / 2 - beyond * (beyond + 1) / 2 : n * n);
  }
  return 2 * 2.0 * pairs * static_cast<double>(shape.heads * shape.size);
}

at::Tensor own_attention(const at::Tensor& fused, const Shape& shape, const AttentionOptions& options) {
  const std::int64_t kv_end = shape.heads + shape.kv_heads;
  return varlen_attention(fused.slice(1, 0, shape.heads), fused.slice(1, shape.heads, kv_end), fused.slice(1, kv_end),
                          options);
}

// `count` segments of `length` tokens, [count * length, H + 2 K, D] -> [count * length, H, D].
at::Tensor aten_attention(const at::Tensor& fused, const Shape& shape, std::int64_t count, std::int64_t length) {
  const auto part = [&](std::int64_t begin, std::int64_t heads) {
    return fused.slice(1, begin, begin + heads).unflatten(0, {count, length}).transpose(1, 2);
  };
  std::optional<at::Tensor> mask;
  if (shape.window > 0) {
    const at::Tensor behind = at::arange(length).unsqueeze(1) - at::arange(length);
    mask = (behind >= 0).logical_and(behind < shape.window);
  }
  return at::scaled_dot_product_attention(part(0, shape.heads), part(shape.heads, shape.kv_heads),
                                          part(shape.heads + shape.kv_heads, shape.kv_heads), mask, shape.dropout,
                                          shape.is_causal && !mask.has_value(), {},
                                          /*enable_gqa=*/shape.kv_heads != shape.heads)
      .transpose(1, 2)
      .reshape({count * length, shape.heads, shape.size});
}

at::Tensor aten_attention(const at::Tensor& fused, const Shape& shape) {
  const auto& lengths = shape.lengths;
  if (lengths.front() == lengths.back())
    return aten_attention(fused, shape, static_cast<std::int64_t>(lengths.size()), lengths.front());
  Tensors parts;
  std::int64_t begin = 0;
  for (const std::int64_t length : lengths) {
    parts.push_back(aten_attention(fused.slice(0, begin, begin + length), shape, 1, length));
    begin += length;
  }
  return at::cat(parts);
}

void add(const Shape& shape, at::ScalarType dtype) {
  std::vector<std::int64_t> offsets{0};
  for (const std::int64_t length : shape.lengths) offsets.push_back(offsets.back() + length);
  const std::int64_t tokens = offsets.back();
  const AttentionOptions options{
      .segment_offsets = std::make_shared<const std::vector<std::int64_t>>(std::move(offsets)),
      .is_causal = shape.is_causal,
      .scale = 1 / std::sqrt(static_cast<double>(shape.size)),
      .window = shape.window,
      .dropout = {.probability = shape.dropout, .key = 1}};
  const std::string heads =
      shape.heads == shape.kv_heads ? std::to_string(shape.heads) : fmt::format("{}of{}", shape.heads, shape.kv_heads);
  const Comparison comparison{
      fmt::format("attention/{}/{}x{}/{}{}{}/{}", shape.segments, heads, shape.size,
                  shape.is_causal ? "causal" : "full", shape.dropout > 0 ? "_dropout" : "",
                  shape.window > 0 ? fmt::format("_window{}", shape.window) : "", name_of(dtype)),
      [=] {
        return Tensors{random_numbers({tokens, shape.heads + 2 * shape.kv_heads, shape.size}, dtype)};
      },
      [=](const Tensors& inputs) { return own_attention(inputs[0], shape, options); },
      [=](const Tensors& inputs) { return aten_attention(inputs[0], shape); }};
  add_forward(comparison, {.flops = flops_of_forward(shape)});
  add_forward_and_backward(comparison, {.flops = 3.5 * flops_of_forward(shape)});
}

}  // namespace

void add_attention() {
  std::vector<std::int64_t> sentences(32);  // 3 to 65 tokens
  for (std::size_t i = 0; i < sentences.size(); ++i) sentences[i] = 3 + static_cast<std::int64_t>(i) * 2;
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
    for (const double dropout : {0.0, 0.1}) {
      add({"4x1024", equal(4, 1024), 12, 12, 64, true, dropout}, dtype);  // GPT-2
      add({"32x25", equal(32, 25), 12, 12, 32, false, dropout}, dtype);   // MiniLM, sentences
    }
    add({"4x1024", equal(4, 1024), 12, 12, 64, false}, dtype);
    add({"4x1024", equal(4, 1024), 16, 4, 64, true}, dtype);
    add({"2x1024", equal(2, 1024), 16, 4, 128, true}, dtype);
    add({"8x512", equal(8, 512), 12, 12, 32, false}, dtype);
    add({"1x4096", equal(1, 4096), 12, 12, 64, true}, dtype);
    add({"1x4096", equal(1, 4096), 12, 12, 64, true, 0, 512}, dtype);
    add({"32x3to65", sentences, 12, 12, 32, false}, dtype);
  }
}

}  // namespace shardtune::measurement
