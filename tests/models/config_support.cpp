#include "tests/models/config_support.hpp"

#include <utility>

#include <gtest/gtest.h>

#include "core/error.hpp"
#include "models/unit.hpp"
#include "tests/models/golden.hpp"

namespace shardtune::testing {

using nlohmann::json;

json bert_config() {
  return {{"model_type", "bert"},          {"vocab_size", 31},           {"hidden_size", 12},
          {"num_hidden_layers", 2},        {"num_attention_heads", 3},   {"intermediate_size", 20},
          {"max_position_embeddings", 16}, {"hidden_dropout_prob", 0.0}, {"attention_probs_dropout_prob", 0.0},
          {"initializer_range", 0.4}};
}
json llama_config() {
  return {{"model_type", "llama"},    {"vocab_size", 31},
          {"hidden_size", 12},        {"num_hidden_layers", 2},
          {"num_attention_heads", 3}, {"num_key_value_heads", 1},
          {"intermediate_size", 20},  {"max_position_embeddings", 16},
          {"initializer_range", 0.4}};
}
json of_type(const char* model_type) {
  json config = llama_config();
  config["model_type"] = model_type;
  return config;
}
json gpt2_config() {
  return {{"model_type", "gpt2"}, {"vocab_size", 31},  {"n_embd", 12},      {"n_layer", 2},      {"n_head", 3},
          {"n_positions", 16},    {"embd_pdrop", 0.0}, {"resid_pdrop", 0.0}, {"attn_pdrop", 0.0}, {"initializer_range", 0.4}};
}

ModelRequest request_for(json& config, std::map<std::string, double> dropout) {
  const std::string type = config.value("model_type", "");
  const bool is_causal = type == "llama" || type == "mistral" || type == "qwen2" || type == "gpt2";
  return {.config = &config,
          .origin = "dir/config.json",
          .task = is_causal ? Task::causal_lm : Task::text_classification,
          .labels = {},
          .dropout = std::move(dropout)};
}
std::unique_ptr<Model> make(json config, std::map<std::string, double> dropout) {
  return make_model(request_for(config, std::move(dropout)));
}
json with(json config, const char* key, const json& value) {
  config[key] = value;
  return config;
}

void expect_refused(const json& config, const std::string& named, std::map<std::string, double> dropout) {
  try {
    make(config, std::move(dropout));
    ADD_FAILURE() << "accepted " << config.dump();
  } catch (const Error& error) {
    EXPECT_TRUE(error.kind() == ErrorKind::config || error.kind() == ErrorKind::data) << error.what();
    EXPECT_NE(std::string(error.what()).find(named), std::string::npos) << named << " is not in: " << error.what();
  }
}

std::set<std::string> names_of(Model& model) {
  std::set<std::string> names;
  for (const Parameter* parameter : all_parameters(model)) names.insert(parameter->name);
  return names;
}

}  // namespace shardtune::testing
