#pragma once
// Small configs for the tests of models/, and what is made of them.
#include <map>
#include <memory>
#include <set>
#include <string>

#include <nlohmann/json.hpp>

#include "models/model.hpp"

namespace shardtune::testing {

// Three heads, two layers, no dropout.
nlohmann::json bert_config();
nlohmann::json llama_config();
nlohmann::json of_type(const char* model_type);  // Llama's fields under another model_type
nlohmann::json gpt2_config();
nlohmann::json with(nlohmann::json config, const char* key, const nlohmann::json& value);

// For the task of the config's model_type. The config must outlive it.
ModelRequest request_for(nlohmann::json& config, std::map<std::string, double> dropout = {});
std::unique_ptr<Model> make(nlohmann::json config, std::map<std::string, double> dropout = {});
// Making it fails with Error{config} or Error{data} and `named` in the message.
void expect_refused(const nlohmann::json& config, const std::string& named, std::map<std::string, double> dropout = {});

std::set<std::string> names_of(Model& model);

}  // namespace shardtune::testing
