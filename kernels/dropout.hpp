#pragma once
// Dropout whose mask is a function of a key and the element's index: nothing is saved for the backward pass, and a
// recomputed forward pass sees the same mask. y = x * m, m = 0 with probability p, else 1 / (1 - p).
//
// Element e of row r is dropped when word (e % 64) / 16 of the Philox4x32-10 block with counter
// (low = e / 64 * 16 + e % 16, high = r) under the site's key is below p * 2^32. Thread-safe.
#include <cstdint>
#include <span>

#include <ATen/core/Tensor.h>

#include "core/batch.hpp"

namespace shardtune {

// One place of a model where dropout acts, in one micro-batch.
struct DropoutSite {
  double probability = 0;  // 0 = off; in [0, 1]
  std::uint64_t key = 0;

  bool is_active() const { return probability > 0; }
};

// Off unless the context is training. `site` numbers the places of a model; it must never change for a given place.
DropoutSite make_dropout_site(const ForwardContext& context, std::int64_t site, double probability);

// x: fp32, bf16 or fp16 of any shape, taken as one row (r = 0) of numel elements in logical order. Returns x itself
// when off.
at::Tensor dropout(const at::Tensor& x, const DropoutSite& site);
at::Tensor dropout_reference(const at::Tensor& x, const DropoutSite& site);

// residual + dropout(x, site) in one pass, bit for bit: what dropout keeps is rounded to the dtype before it is added.
// residual: of x's shape and dtype.
at::Tensor add_dropout(const at::Tensor& residual, const at::Tensor& x, const DropoutSite& site);

// The multipliers m of elements [first, first + into.size()) of `row`.
void fill_dropout_row(const DropoutSite& site, std::uint64_t row, std::span<float> into, std::uint64_t first = 0);
// The same as bits: bit i of word w is set where element first + 64 w + i is kept (first a multiple of 64); a kept
// one's multiplier is dropout_keep_scale.
void fill_dropout_bits(const DropoutSite& site, std::uint64_t row, std::span<std::uint64_t> into,
                       std::uint64_t first = 0);
float dropout_keep_scale(const DropoutSite& site);  // 1 / (1 - p); 0 for p = 1
// One multiplier by the definition above, for tests and references.
float dropout_multiplier(const DropoutSite& site, std::uint64_t row, std::uint64_t element);

}  // namespace shardtune
