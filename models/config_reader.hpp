#pragma once
// Reading Hugging Face's config.json: a missing key takes the default of HF's configuration class, and whatever changes
// the result without being implemented is refused by name.
#include <cstdint>
#include <initializer_list>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "kernels/activation.hpp"
#include "models/model.hpp"

namespace shardtune {

// A view over a parsed config; both references must outlive it. All failures are Error{config} or Error{data} that name
// the file and the field.
class ConfigReader {
 public:
  ConfigReader(const nlohmann::json& config, const std::string& origin) : config_(config), origin_(origin) {}

  bool has(const char* key) const;  // present and not null
  const std::string& origin() const { return origin_; }

  // Values outside [minimum, maximum] are refused. The limits keep products of two sizes inside 64 bits, and a hostile
  // file from making millions of layers or names.
  static constexpr std::int64_t kMaxSize = (1LL << 31) - 1, kMaxLayers = 100'000, kMaxLabels = 1'000'000;
  std::int64_t integer(const char* key, std::int64_t fallback, std::int64_t minimum = 1,
                       std::int64_t maximum = kMaxSize) const;
  std::int64_t num_layers(const char* key, std::int64_t fallback) const {
    return integer(key, fallback, 1, kMaxLayers);
  }
  double number(const char* key, double fallback) const;
  double positive(const char* key, double fallback) const;
  bool flag(const char* key, bool fallback) const;
  std::string text(const char* key, const std::string& fallback) const;
  double probability(const char* key, double fallback) const;  // in [0, 1]
  Activation activation(const char* key, const std::string& fallback) const;
  // -1 when absent or null; a negative one counts from the end as in torch; must lie inside the table.
  std::int64_t padding_row(const char* key, std::int64_t fallback, std::int64_t rows) const;

  // Refused when the field is present, not null, and none of the JSON texts in `allowed`.
  void refuse_unless(const char* key, std::initializer_list<const char*> allowed) const;
  [[noreturn]] void refuse(const std::string& what) const;

 private:
  const nlohmann::json& config_;
  const std::string& origin_;
};

// Class names: the request's, else the config's id2label, else LABEL_0.. for num_labels (default 2).
std::vector<std::string> classification_labels(const ModelRequest& request);
// The value of a dropout option: the request's override, else `fallback`. Marks the override as used.
class DropoutOverrides {
 public:
  explicit DropoutOverrides(const ModelRequest& request) : request_(request) {}
  double take(const char* name, double fallback);
  // Error{config} for overrides that nobody took.
  void finish(const std::string& architecture) const;

 private:
  const ModelRequest& request_;
  std::vector<std::string> taken_;
};

// The config an exported model gets: the given one with `architecture`, fp32 dtype and the dropout overrides in it.
nlohmann::json exported_config(const ModelRequest& request, const std::string& architecture);

}  // namespace shardtune
