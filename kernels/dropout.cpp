#include "kernels/dropout.hpp"

#include <algorithm>
#include <cmath>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/rng.hpp"
#include "kernels/element_type.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

constexpr std::int64_t kGroup = 64;  // elements made by 16 Philox blocks

std::uint64_t drop_below(double probability) {
  return static_cast<std::uint64_t>(std::llround(std::clamp(probability, 0.0, 1.0) * 4294967296.0));
}
float keep_scale(double probability) {
  return probability < 1.0 ? static_cast<float>(1.0 / (1.0 - probability)) : 0.0F;
}

// Sixteen Philox4x32-10 blocks with consecutive counters; plain arrays so that the compiler finds the widening
// multiply.
SHARDTUNE_INLINE void philox_group(std::uint64_t key, std::uint64_t first, std::uint64_t row,
                                   std::uint32_t (&c)[4][16]) {
  for (std::uint32_t i = 0; i < 16; ++i) {
    c[0][i] = static_cast<std::uint32_t>(first) + i;  // first is a multiple of 16: no carry
    c[1][i] = static_cast<std::uint32_t>(first >> 32);
    c[2][i] = static_cast<std::uint32_t>(row);
    c[3][i] = static_cast<std::uint32_t>(row >> 32);
  }
  auto k0 = static_cast<std::uint32_t>(key), k1 = static_cast<std::uint32_t>(key >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < 16; ++i) {
      const std::uint64_t a = std::uint64_t{0xD2511F53U} * c[0][i], b = std::uint64_t{0xCD9E8D57U} * c[2][i];
      c[0][i] = static_cast<std::uint32_t>(b >> 32) ^ c[1][i] ^ k0;
      c[2][i] = static_cast<std::uint32_t>(a >> 32) ^ c[3][i] ^ k1;
      c[1][i] = static_cast<std::uint32_t>(b);
      c[3][i] = static_cast<std::uint32_t>(a);
    }
    k0 += 0x9E3779B9U;
    k1 += 0xBB67AE85U;
  }
}

struct Masker {
  std::uint64_t key, row;
  std::uint32_t limit;
  bool drops_all;
  float scale;

  Masker(const DropoutSite& site, std::uint64_t row_index) : key(site.key), row(row_index) {
    const std::uint64_t below = drop_below(site.probability);
    drops_all = below > UINT32_MAX;
    limit = drops_all ? 0 : static_cast<std::uint32_t>(below);
    scale = drops_all ? 0.0F : keep_scale(site.probability);
  }
  // Multipliers of elements [64 group, 64 group + 64).
  SHARDTUNE_INLINE void make(std::int64_t group, float* out) const {
    std::uint32_t words[4][16];
    philox_group(key, static_cast<std::uint64_t>(group) * 16, row, words);
    for (int w = 0; w < 4; ++w)
      for (int i = 0; i < 16; ++i) out[w * 16 + i] = words[w][i] < limit ? 0.0F : scale;
  }
  // The same as bits.
  SHARDTUNE_INLINE std::uint64_t make_bits(std::int64_t group) const {
    std::uint32_t words[4][16], lanes[16];
    philox_group(key, static_cast<std::uint64_t>(group) * 16, row, words);
    std::uint64_t bits = 0;
    for (int half = 0; half < 2; ++half) {
      // Lane i holds the bits of words 2 half and 2 half + 1, each at its place in the result.
      for (std::uint32_t i = 0; i < 16; ++i)
        lanes[i] = (words[2 * half][i] < limit ? 0U : 1U << i) | (words[2 * half + 1][i] < limit ? 0U : 0x10000U << i);
      std::uint32_t all = 0;
      for (const std::uint32_t lane : lanes) all |= lane;
      bits |= static_cast<std::uint64_t>(all) << (32 * half);
    }
    return drops_all ? 0 : bits;
  }
};

template <class T>
void apply_groups(const T* in, T* out, std::int64_t numel, const Masker& masker, std::int64_t begin, std::int64_t end) {
  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
    float mask[kGroup];
    for (std::int64_t group = begin; group < end; ++group) {
      masker.make(group, mask);
      const std::int64_t first = group * kGroup;
      for (std::int64_t at = 0; at < std::min(kGroup, numel - first); at += simd::kLanes) {
        const std::int64_t left = numel - first - at;
        // A select, not a product: a dropped infinity is zero.
        const simd::Float m = simd::load(mask + at);
        if (left >= simd::kLanes) {
          const simd::Float x = simd::load(in + first + at);
          simd::store(out + first + at, m != 0.0F ? x * m : simd::Float{});
        } else {
          const simd::Float x = simd::load_some(in + first + at, left, 0.0F);
          simd::store_some(out + first + at, m != 0.0F ? x * m : simd::Float{}, left);
        }
      }
    }
  });
}

at::Tensor masked(const at::Tensor& x, const DropoutSite& site) {
  const at::Tensor in = x.contiguous();
  at::Tensor out = at::empty_like(in);
  const Masker masker(site, 0);
  const std::int64_t numel = in.numel(), groups = (numel + kGroup - 1) / kGroup;
  at::parallel_for(0, groups, 256, [&](std::int64_t begin, std::int64_t end) {
    with_element_type(in.scalar_type(), [&](auto element) {
      using T = decltype(element);
      apply_groups(in.const_data_ptr<T>(), out.mutable_data_ptr<T>(), numel, masker, begin, end);
    });
  });
  return out;
}

struct Dropout : torch::autograd::Function<Dropout> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x, double probability,
                            std::int64_t key) {
    ctx->saved_data["probability"] = probability;
    ctx->saved_data["key"] = key;
    return masked(x, {.probability = probability, .key = static_cast<std::uint64_t>(key)});
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const DropoutSite site{.probability = ctx->saved_data["probability"].toDouble(),
                           .key = static_cast<std::uint64_t>(ctx->saved_data["key"].toInt())};
    return {masked(grads[0], site), {}, {}};
  }
};

}  // namespace

DropoutSite make_dropout_site(const ForwardContext& context, std::int64_t site, double probability) {
  if (!context.is_training || probability <= 0) return {};
  return {.probability = probability,
          .key = mix_key(context.seed, static_cast<std::uint64_t>(context.step),
                         static_cast<std::uint64_t>(context.micro_batch), static_cast<std::uint64_t>(site))};
}

at::Tensor dropout(const at::Tensor& x, const DropoutSite& site) {
  if (!site.is_active()) return x;
  return Dropout::apply(x, site.probability, static_cast<std::int64_t>(site.key));
}

float dropout_multiplier(const DropoutSite& site, std::uint64_t row, std::uint64_t element) {
  const auto words = philox4x32(site.key, element / 64 * 16 + element % 16, row);
  return words[element % 64 / 16] < drop_below(site.probability) ? 0.0F : keep_scale(site.probability);
}

at::Tensor dropout_reference(const at::Tensor& x, const DropoutSite& site) {
  if (!site.is_active()) return x;
  at::Tensor mask = at::empty({x.numel()}, at::kFloat);
  for (std::int64_t i = 0; i < x.numel(); ++i)
    mask.mutable_data_ptr<float>()[i] = dropout_multiplier(site, 0, static_cast<std::uint64_t>(i));
  return (x.to(at::kFloat) * mask.view(x.sizes())).to(x.scalar_type());
}

void fill_dropout_row(const DropoutSite& site, std::uint64_t row, std::span<float> into) {
  const Masker masker(site, row);
  const auto size = static_cast<std::int64_t>(into.size());
  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
    for (std::int64_t group = 0; group * kGroup < size; ++group) {
      float mask[kGroup];
      masker.make(group, mask);
      std::copy_n(mask, std::min(kGroup, size - group * kGroup), into.data() + group * kGroup);
    }
  });
}

void fill_dropout_bits(const DropoutSite& site, std::uint64_t row, std::span<std::uint64_t> into) {
  const Masker masker(site, row);
  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
    for (std::size_t group = 0; group < into.size(); ++group) into[group] = masker.make_bits(static_cast<std::int64_t>(group));
  });
}

float dropout_keep_scale(const DropoutSite& site) { return keep_scale(site.probability); }

}  // namespace shardtune
