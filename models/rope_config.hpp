#pragma once
// Rotary frequencies from config.json, in transformers' v4 (rope_theta, rope_scaling) and v5 (rope_parameters)
// spelling.
#include <cstdint>
#include <string>

#include <ATen/core/Tensor.h>
#include <nlohmann/json_fwd.hpp>

namespace shardtune {

// [head_size / 2] fp32, computed with transformers' operations in fp32 (modeling_rope_utils.py). Types default, linear
// and llama3; every other type, and a rotary dimension smaller than the head, is refused by name (Error{config}).
at::Tensor read_inverse_frequencies(const nlohmann::json& config, const std::string& origin, std::int64_t head_size);

}  // namespace shardtune
