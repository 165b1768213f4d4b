#include <algorithm>
#include <cmath>
#include <cstdint>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/error.hpp"
#include "core/hash.hpp"
#include "core/rng.hpp"
#include "models/model.hpp"

namespace shardtune {
namespace {

// Elements 2b and 2b + 1 are the two Box-Muller normals of Philox block b, so any slice can be filled on its own.
void fill_normal(float* into, std::int64_t offset, std::int64_t count, std::uint64_t key, double deviation) {
  const std::int64_t first_block = offset / 2, last_block = (offset + count + 1) / 2;
  at::parallel_for(first_block, last_block, 4096, [&](std::int64_t begin, std::int64_t end) {
    for (std::int64_t block = begin; block < end; ++block) {
      const auto words = philox4x32(key, static_cast<std::uint64_t>(block), 0);
      const auto unit = [](std::uint32_t high, std::uint32_t low) {  // 53 bits, [0, 1)
        return static_cast<double>(((std::uint64_t{high} << 32) | low) >> 11) * 0x1.0p-53;
      };
      const double radius = deviation * std::sqrt(-2.0 * std::log(1.0 - unit(words[0], words[1])));
      const double angle = 6.283185307179586 * unit(words[2], words[3]);
      const double normals[2] = {radius * std::cos(angle), radius * std::sin(angle)};
      for (std::int64_t i = 0; i < 2; ++i) {
        const std::int64_t at = 2 * block + i - offset;
        if (at >= 0 && at < count) into[at] = static_cast<float>(normals[i]);
      }
    }
  });
}

}  // namespace

void initialize_slice(const Parameter& parameter, std::uint64_t seed, std::int64_t offset, at::Tensor into) {
  check_internal(into.scalar_type() == at::kFloat && into.is_contiguous() && offset >= 0 &&
                     offset + into.numel() <= parameter.numel(),
                 "initialize_slice fills a contiguous fp32 slice inside the parameter");
  auto* data = into.mutable_data_ptr<float>();
  const std::int64_t count = into.numel();
  const InitRule& rule = parameter.init;
  switch (rule.kind) {
    case InitRule::Kind::zeros: std::fill_n(data, count, 0.0F); break;
    case InitRule::Kind::ones: std::fill_n(data, count, 1.0F); break;
    case InitRule::Kind::normal:
      fill_normal(data, offset, count, mix_key(seed, hash_bytes(parameter.name)), rule.deviation);
      break;
  }
  if (rule.zero_row >= 0) {
    const std::int64_t width = parameter.numel() / parameter.shape.at(0);
    const std::int64_t begin = std::clamp<std::int64_t>(rule.zero_row * width - offset, 0, count);
    const std::int64_t end = std::clamp<std::int64_t>((rule.zero_row + 1) * width - offset, 0, count);
    std::fill(data + begin, data + end, 0.0F);
  }
}

void materialize(Unit& unit, at::ScalarType dtype, std::uint64_t seed) {
  for (Parameter* parameter : unit.parameters) {
    at::Tensor value = at::empty(parameter->shape, at::kFloat);
    initialize_slice(*parameter, seed, 0, value.view(-1));
    parameter->value = value.to(dtype).requires_grad_(parameter->is_trainable);
  }
}

}  // namespace shardtune
