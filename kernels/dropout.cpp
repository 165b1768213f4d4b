#include "kernels/dropout.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <optional>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "core/rng.hpp"
#include "kernels/element_type.hpp"
#include "kernels/instruction_set.hpp"
#include "kernels/philox_groups.hpp"
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

SHARDTUNE_INLINE void philox_group(std::uint64_t key, std::uint64_t group, std::uint64_t row, PhiloxGroup& into) {
  auto& c = into.words;
  const std::uint64_t first = group * 16;
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
  bool drops_all, has_avx512;
  float scale;

  Masker(const DropoutSite& site, std::uint64_t row_index)
      : key(site.key), row(row_index), has_avx512(instruction_set() >= InstructionSet::avx512) {
    const std::uint64_t below = drop_below(site.probability);
    drops_all = below > UINT32_MAX;
    limit = drops_all ? 0 : static_cast<std::uint32_t>(below);
    scale = drops_all ? 0.0F : keep_scale(site.probability);
  }
  // Random words of elements [64 group, 64 (group + count)), count <= kGroupsAtOnce.
  SHARDTUNE_INLINE void draw(std::int64_t group, std::int64_t count, PhiloxGroup* into) const {
    const auto first = static_cast<std::uint64_t>(group);
#if defined(__x86_64__)
    if (has_avx512) return philox_groups_avx512(key, first, row, into, count);
#endif
    for (std::int64_t g = 0; g < count; ++g) philox_group(key, first + static_cast<std::uint64_t>(g), row, into[g]);
  }
  // The multipliers of a group's elements.
  SHARDTUNE_INLINE void multipliers(const PhiloxGroup& drawn, float* out) const {
    for (std::int64_t w = 0; w < 4; ++w) {  // written out as vectors: GCC makes branches of a loop over the lanes
      simd::Word word;
      std::memcpy(&word, drawn.words[w], sizeof word);
      simd::store(out + w * simd::kLanes, word < limit ? simd::Float{} : simd::broadcast(scale));
    }
  }
  // The same as bits.
  SHARDTUNE_INLINE std::uint64_t bits(const PhiloxGroup& drawn) const {
    const auto& words = drawn.words;
    std::uint32_t lanes[16];
    std::uint64_t result = 0;
    for (int half = 0; half < 2; ++half) {
      // Lane i holds the bits of words 2 half and 2 half + 1, each at its place in the result.
      for (std::uint32_t i = 0; i < 16; ++i)
        lanes[i] = (words[2 * half][i] < limit ? 0U : 1U << i) | (words[2 * half + 1][i] < limit ? 0U : 0x10000U << i);
      std::uint32_t all = 0;
      for (const std::uint32_t lane : lanes) all |= lane;
      result |= static_cast<std::uint64_t>(all) << (32 * half);
    }
    return drops_all ? 0 : result;
  }
};

// Calls visit(group, its random words) for groups [begin, end).
template <class Visit>
SHARDTUNE_INLINE void for_each_group(const Masker& masker, std::int64_t begin, std::int64_t end, Visit visit) {
  PhiloxGroup drawn[kGroupsAtOnce];
  for (std::int64_t first = begin; first < end; first += kGroupsAtOnce) {
    const std::int64_t count = std::min(kGroupsAtOnce, end - first);
    masker.draw(first, count, drawn);
    for (std::int64_t g = 0; g < count; ++g) visit(first + g, drawn[g]);
  }
}

template <class T>
struct Groups {
  const T *x, *residual;  // residual: null = none
  T* out;
  std::int64_t numel;
};

template <class T>
void apply_groups(const Groups<T>& io, const Masker& masker, std::int64_t begin, std::int64_t end) {
  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
    float mask[kGroup];
    for_each_group(masker, begin, end, [&](std::int64_t group, const PhiloxGroup& drawn) SHARDTUNE_VECTOR_BODY {
      masker.multipliers(drawn, mask);
      const std::int64_t first = group * kGroup, last = std::min(io.numel, first + kGroup);
      simd::for_each_vector(last - first, [&](std::int64_t at, std::int64_t stop) SHARDTUNE_VECTOR_BODY {
        // A select, not a product: a dropped infinity is zero.
        const simd::Float m = simd::load(mask + at), x = simd::load_at(io.x + first, at, stop);
        const simd::Float y = m != 0.0F ? x * m : simd::Float{};
        simd::store_at(
            io.out + first, at, stop,
            io.residual == nullptr ? y : simd::load_at(io.residual + first, at, stop) + simd::rounded_to<T>(y));
      });
    });
  });
}

// residual: undefined = none
at::Tensor masked(const at::Tensor& x_any, const at::Tensor& residual_any, const DropoutSite& site) {
  const at::Tensor x = x_any.contiguous(), residual = residual_any.defined() ? residual_any.contiguous() : at::Tensor();
  at::Tensor out = at::empty_like(x);
  const Masker masker(site, 0);
  with_element_type(x.scalar_type(), [&](auto element) {
    using T = decltype(element);
    const Groups<T> io{x.const_data_ptr<T>(), residual.defined() ? residual.const_data_ptr<T>() : nullptr,
                       out.mutable_data_ptr<T>(), x.numel()};
    at::parallel_for(0, (io.numel + kGroup - 1) / kGroup, 256,
                     [&](std::int64_t begin, std::int64_t end) { apply_groups(io, masker, begin, end); });
  });
  return out;
}

struct Dropout : torch::autograd::Function<Dropout> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& x,
                            const std::optional<at::Tensor>& residual, const DropoutSite& site) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    ctx->saved_data["has_residual"] = residual.has_value();
    ctx->saved_data["probability"] = site.probability;
    ctx->saved_data["key"] = static_cast<std::int64_t>(site.key);
    return masked(x, residual.value_or(at::Tensor()), site);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const DropoutSite site{.probability = ctx->saved_data["probability"].toDouble(),
                           .key = static_cast<std::uint64_t>(ctx->saved_data["key"].toInt())};
    return {masked(grads[0], {}, site), ctx->saved_data["has_residual"].toBool() ? grads[0] : at::Tensor(), {}};
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
  return site.is_active() ? Dropout::apply(x, std::nullopt, site) : x;
}

at::Tensor add_dropout(const at::Tensor& residual, const at::Tensor& x, const DropoutSite& site) {
  check_internal(residual.sizes() == x.sizes() && residual.scalar_type() == x.scalar_type(),
                 "add_dropout takes two tensors of one shape and dtype");
  return site.is_active() ? Dropout::apply(x, std::optional(residual), site) : residual + x;
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

void fill_dropout_row(const DropoutSite& site, std::uint64_t row, std::span<float> into, std::uint64_t first) {
  const Masker masker(site, row);
  const auto begin = static_cast<std::int64_t>(first), end = begin + static_cast<std::int64_t>(into.size());
  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
    for_each_group(masker, begin / kGroup, (end + kGroup - 1) / kGroup,
                   [&](std::int64_t group, const PhiloxGroup& drawn) SHARDTUNE_VECTOR_BODY {
                     const std::int64_t from = std::max(begin, group * kGroup),
                                        to = std::min(end, (group + 1) * kGroup);
                     float* out = into.data() + (from - begin);
                     if (to - from == kGroup) return masker.multipliers(drawn, out);
                     float mask[kGroup];
                     masker.multipliers(drawn, mask);
                     std::copy(mask + (from - group * kGroup), mask + (to - group * kGroup), out);
                   });
  });
}

void fill_dropout_bits(const DropoutSite& site, std::uint64_t row, std::span<std::uint64_t> into, std::uint64_t first) {
  const Masker masker(site, row);
  const std::int64_t begin = static_cast<std::int64_t>(first) / kGroup;
  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
    for_each_group(masker, begin, begin + static_cast<std::int64_t>(into.size()),
                   [&](std::int64_t group, const PhiloxGroup& drawn)
                       SHARDTUNE_VECTOR_BODY { into[static_cast<std::size_t>(group - begin)] = masker.bits(drawn); });
  });
}

float dropout_keep_scale(const DropoutSite& site) { return keep_scale(site.probability); }

}  // namespace shardtune
