#include "models/config_reader.hpp"

#include <algorithm>
#include <map>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/json.hpp"

namespace shardtune {

void ConfigReader::refuse(const std::string& what) const {
  fail(ErrorKind::config, fmt::format("{}: {}", origin_, what));
}

bool ConfigReader::has(const char* key) const {
  const auto it = config_.find(key);
  return it != config_.end() && !it->is_null();
}

std::int64_t ConfigReader::integer(const char* key, std::int64_t fallback, std::int64_t minimum,
                                   std::int64_t maximum) const {
  const std::int64_t value = json_get_or<std::int64_t>(config_, key, fallback, origin_);
  if (value < minimum) refuse(fmt::format("'{}' is {}, it must be at least {}", key, value, minimum));
  if (value > maximum) refuse(fmt::format("'{}' is {}, it must be at most {}", key, value, maximum));
  return value;
}

double ConfigReader::number(const char* key, double fallback) const {
  return json_get_or<double>(config_, key, fallback, origin_);
}

double ConfigReader::positive(const char* key, double fallback) const {
  const double value = number(key, fallback);
  if (!(value > 0)) refuse(fmt::format("'{}' is {}, it must be greater than 0", key, value));
  return value;
}

bool ConfigReader::flag(const char* key, bool fallback) const {
  return json_get_or<bool>(config_, key, fallback, origin_);
}

std::string ConfigReader::text(const char* key, const std::string& fallback) const {
  return json_get_or<std::string>(config_, key, fallback, origin_);
}

double ConfigReader::probability(const char* key, double fallback) const {
  const double value = number(key, fallback);
  if (!(value >= 0 && value <= 1)) refuse(fmt::format("'{}' is {}, it must lie in [0, 1]", key, value));
  return value;
}

Activation ConfigReader::activation(const char* key, const std::string& fallback) const {
  const std::string name = text(key, fallback);
  const auto found = find_activation(name);
  if (!found)
    refuse(fmt::format("'{}' is '{}', which is not implemented; known activations: {}", key, name, activation_names()));
  return *found;
}

std::int64_t ConfigReader::padding_row(const char* key, std::int64_t fallback, std::int64_t rows) const {
  if (config_.contains(key) ? config_.at(key).is_null() : fallback < 0) return -1;
  const std::int64_t given = json_get_or<std::int64_t>(config_, key, fallback, origin_);
  const std::int64_t row = given < 0 ? given + rows : given;
  if (row < 0 || row >= rows) refuse(fmt::format("'{}' is {}, outside the {} rows of the table", key, given, rows));
  return row;
}

void ConfigReader::refuse_unless(const char* key, std::initializer_list<const char*> allowed) const {
  if (!has(key)) return;
  const std::string value = config_.at(key).dump();
  if (std::none_of(allowed.begin(), allowed.end(), [&](const char* text) { return value == text; }))
    refuse(fmt::format("'{}' = {} is not implemented; supported: {}", key, value.substr(0, 80),
                       fmt::join(allowed.begin(), allowed.end(), ", ")));
}

std::vector<std::string> classification_labels(const ModelRequest& request) {
  if (!request.labels.empty()) return request.labels;
  const nlohmann::json& config = *request.config;
  const ConfigReader reader(config, request.origin);
  std::vector<std::string> labels;
  if (reader.has("id2label")) {
    const nlohmann::json& names = config.at("id2label");
    if (!names.is_object()) reader.refuse("'id2label' must be an object of class number to name");
    for (std::size_t id = 0; id < names.size(); ++id) {
      const auto it = names.find(std::to_string(id));
      if (it == names.end()) reader.refuse(fmt::format("'id2label' has {} classes but no key '{}'", names.size(), id));
      labels.push_back(it->is_string() ? it->get<std::string>() : it->dump());
    }
    if (labels.empty()) reader.refuse("'id2label' is empty");
    return labels;
  }
  const std::int64_t count = reader.integer("num_labels", 2, 1, ConfigReader::kMaxLabels);
  for (std::int64_t id = 0; id < count; ++id) labels.push_back(fmt::format("LABEL_{}", id));
  return labels;
}

double DropoutOverrides::take(const char* name, double fallback) {
  const auto it = request_.dropout.find(name);
  if (it == request_.dropout.end()) return fallback;
  taken_.emplace_back(name);
  if (!(it->second >= 0 && it->second <= 1))
    fail(ErrorKind::config, fmt::format("{} is {}, it must lie in [0, 1]", name, it->second));
  return it->second;
}

void DropoutOverrides::finish(const std::string& architecture) const {
  for (const auto& [name, value] : request_.dropout)
    if (std::find(taken_.begin(), taken_.end(), name) == taken_.end())
      fail(ErrorKind::config,
           fmt::format("{} = {} was given, but {} has no such dropout; remove the option", name, value, architecture));
}

nlohmann::json exported_config(const ModelRequest& request, const std::string& architecture) {
  nlohmann::json config = *request.config;
  config["architectures"] = {architecture};
  config.erase("torch_dtype");
  config["dtype"] = "float32";
  for (const auto& [name, value] : request.dropout) config[name] = value;
  return config;
}

}  // namespace shardtune
