#include "models/rope_config.hpp"

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "models/config_reader.hpp"

namespace shardtune {
namespace {

constexpr double kPi = 3.141592653589793;

double required(const ConfigReader& in, const char* key) {
  if (!in.has(key)) in.refuse(fmt::format("the rope settings need '{}'", key));
  return in.positive(key, 1.0);
}

// Long wavelengths are divided by factor, short ones kept, those between blended (Llama 3.1).
at::Tensor llama3_scaled(const ConfigReader& in, double old_length, const at::Tensor& frequencies) {
  const double factor = required(in, "factor"), low = required(in, "low_freq_factor");
  const double high = required(in, "high_freq_factor");
  if (!(high > low)) in.refuse("'high_freq_factor' must be greater than 'low_freq_factor'");
  const at::Tensor wavelengths = 2 * kPi / frequencies;
  const at::Tensor scaled = at::where(wavelengths > old_length / low, frequencies / factor, frequencies);
  const at::Tensor smooth = (old_length / wavelengths - low) / (high - low);
  const at::Tensor blended = (1 - smooth) * scaled / factor + smooth * scaled;
  const at::Tensor is_medium = (wavelengths >= old_length / high).logical_and(wavelengths <= old_length / low);
  return at::where(is_medium, blended, scaled);
}

}  // namespace

at::Tensor read_inverse_frequencies(const nlohmann::json& config, const std::string& origin, std::int64_t head_size) {
  const ConfigReader top(config, origin);
  // The old spelling wins where both are given, unless it is empty.
  const char* const key =
      top.has("rope_scaling") && !config.at("rope_scaling").empty() ? "rope_scaling" : "rope_parameters";
  const nlohmann::json rope = top.has(key) ? config.at(key) : nlohmann::json::object();
  if (!rope.is_object()) top.refuse(fmt::format("'{}' must be an object", key));
  const std::string rope_origin = origin + ": " + key;
  const ConfigReader in(rope, rope_origin);
  for (const ConfigReader& reader : {top, in}) reader.refuse_unless("partial_rotary_factor", {"1", "1.0"});
  const double theta = in.positive("rope_theta", top.positive("rope_theta", 10000.0));
  const std::string type = in.text("rope_type", in.text("type", "default"));
  const at::Tensor exponents = at::arange(0, head_size, 2, at::kLong).to(at::kFloat) / static_cast<double>(head_size);
  const at::Tensor frequencies = 1.0 / at::pow(theta, exponents);
  if (type == "default") {
    for (const auto& [name, value] : rope.items())
      if (value.is_object()) in.refuse(fmt::format("'{}': rope settings per layer type are not implemented", name));
    return frequencies;
  }
  if (type == "linear") return frequencies / required(in, "factor");
  if (type == "llama3") {
    const char* const length = "original_max_position_embeddings";
    const double fallback = in.positive(length, static_cast<double>(top.integer("max_position_embeddings", 2048)));
    return llama3_scaled(in, top.positive(length, fallback), frequencies);
  }
  in.refuse(fmt::format("rope type '{}' is not implemented; supported: default, linear, llama3", type));
}

}  // namespace shardtune
