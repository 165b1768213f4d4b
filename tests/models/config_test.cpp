// What config.json decides: architecture, parameters, rotary frequencies, refusals.
#include <map>
#include <memory>
#include <set>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "models/model.hpp"
#include "models/rope_config.hpp"
#include "models/unit.hpp"
#include "tests/models/config_support.hpp"
#include "tests/models/golden.hpp"

namespace shardtune::testing {
namespace {

using nlohmann::json;

// --- refusals ----------------------------------------------------------------------------------------------------

TEST(ModelConfig, FieldsThatWouldChangeTheResultAreRefusedByName) {
  const std::vector<std::pair<const char*, json>> bert = {{"position_embedding_type", "relative_key"},
                                                          {"position_embedding_type", "relative_key_query"},
                                                          {"is_decoder", true},
                                                          {"add_cross_attention", true},
                                                          {"pruned_heads", {{"0", {1}}}},
                                                          {"problem_type", "regression"},
                                                          {"problem_type", "multi_label_classification"},
                                                          {"hidden_act", "quick_gelu"},
                                                          {"hidden_act", "gelu_10"},
                                                          {"quantization_config", {{"bits", 4}}},
                                                          {"num_attention_heads", 5},
                                                          {"hidden_dropout_prob", 1.5},
                                                          {"layer_norm_eps", 0.0},
                                                          {"pad_token_id", 31}};
  for (const auto& [key, value] : bert) expect_refused(with(bert_config(), key, value), key);
  const std::vector<std::pair<const char*, json>> llama = {{"sliding_window", 8},
                                                           {"use_sliding_window", true},
                                                           {"layer_types", {"sliding_attention"}},
                                                           {"attn_logit_softcapping", 50.0},
                                                           {"final_logit_softcapping", 30.0},
                                                           {"qk_norm", true},
                                                           {"is_causal", false},
                                                           {"no_rope_layers", {1, 0}},
                                                           {"partial_rotary_factor", 0.5},
                                                           {"hidden_act", "relu2"},
                                                           {"head_dim", 5},
                                                           {"num_key_value_heads", 2},
                                                           {"quantization_config", {{"bits", 4}}},
                                                           {"attention_dropout", -0.1}};
  for (const auto& [key, value] : llama) expect_refused(with(llama_config(), key, value), key);
  for (const auto& [key, value] : std::vector<std::pair<const char*, json>>{{"layer_types", {"sliding_attention"}},
                                                                            {"use_sliding_window", true},
                                                                            {"sliding_window", 0},
                                                                            {"attention_bias", true},
                                                                            {"mlp_bias", true}})
    expect_refused(with(of_type("mistral"), key, value), key);
  for (const auto& [key, value] :
       std::vector<std::pair<const char*, json>>{{"layer_types", {"full_attention"}},
                                                 {"layer_types", {"full_attention", "chunked_attention"}},
                                                 {"layer_types", {"full_attention", "sliding_attention"}},
                                                 {"max_window_layers", -1},
                                                 {"attention_bias", false},
                                                 {"mlp_bias", true}})
    expect_refused(with(of_type("qwen2"), key, value), key);
  const std::vector<std::pair<const char*, json>> gpt2 = {{"add_cross_attention", true},
                                                          {"is_causal", false},
                                                          {"pruned_heads", {{"0", {1}}}},
                                                          {"activation_function", "quick_gelu"},
                                                          {"n_head", 5},
                                                          {"layer_norm_epsilon", 0.0},
                                                          {"resid_pdrop", 1.5}};
  for (const auto& [key, value] : gpt2) expect_refused(with(gpt2_config(), key, value), key);
}

TEST(ModelConfig, FieldsAtTheirNeutralValuesAreTaken) {
  json bert = bert_config();
  bert.update({{"position_embedding_type", "absolute"},
               {"is_decoder", false},
               {"pruned_heads", json::object()},
               {"problem_type", nullptr},
               {"pad_token_id", nullptr},
               {"classifier_dropout", nullptr}});
  EXPECT_NO_THROW(make(bert));
  json llama = llama_config();
  llama.update({{"sliding_window", nullptr},
                {"rope_scaling", nullptr},
                {"head_dim", nullptr},
                {"pretraining_tp", 1},
                {"num_key_value_heads", nullptr},
                {"hidden_act", "gelu_pytorch_tanh"}});
  EXPECT_NO_THROW(make(llama));
}

TEST(ModelConfig, OneLabelAndUnusableLabelsAreRefused) {
  expect_refused(with(bert_config(), "num_labels", 1), "regression");
  expect_refused(with(bert_config(), "id2label", {{"0", "a"}, {"2", "b"}}), "id2label");
  const auto model = make(with(bert_config(), "id2label", {{"0", "a"}, {"1", "b"}, {"2", "c"}}));
  EXPECT_EQ(model->config_json().at("label2id"), (json{{"a", 0}, {"b", 1}, {"c", 2}}));
}

// --- architecture --------------------------------------------------------------------------------------------------

TEST(ModelConfig, ModelTypeDecidesAndTheClassCountsWithoutIt) {
  EXPECT_NO_THROW(make(with(bert_config(), "architectures", {"BertForMaskedLM"})));
  EXPECT_NO_THROW(make(with(llama_config(), "architectures", {"LlamaModel"})));
  json by_class = bert_config();
  by_class.erase("model_type");
  expect_refused(by_class, "not supported");
  by_class["architectures"] = {"BertModel"};
  EXPECT_NO_THROW(make(by_class));
  // transformers runs Mistral, with its sliding window.
  const auto mistral = make(with(of_type("mistral"), "architectures", {"LlamaForCausalLM"}));
  EXPECT_EQ(mistral->config_json().at("architectures"), json{"MistralForCausalLM"});
  EXPECT_EQ(mistral->config_json().at("model_type"), "mistral");
  expect_refused({{"model_type", "gemma2"}, {"architectures", {"LlamaForCausalLM"}}}, "model_type 'gemma2'");
  expect_refused({{"model_type", "roberta"}, {"architectures", {"RobertaModel"}}}, "RobertaModel");
  json llama = llama_config();
  ModelRequest wrong_task = request_for(llama);
  wrong_task.task = Task::text_classification;
  EXPECT_THROW(make_model(wrong_task), Error);
}

TEST(ModelConfig, LlamaBiasesAndTiedHead) {
  const auto plain = names_of(*make(llama_config()));
  EXPECT_TRUE(plain.contains("lm_head.weight"));
  for (const std::string& name : plain) EXPECT_FALSE(name.ends_with(".bias")) << name;
  EXPECT_FALSE(names_of(*make(with(llama_config(), "tie_word_embeddings", true))).contains("lm_head.weight"));
  const auto attention = names_of(*make(with(llama_config(), "attention_bias", true)));
  const auto mlp = names_of(*make(with(llama_config(), "mlp_bias", true)));
  EXPECT_EQ(attention.size(), plain.size() + 2 * 4);
  EXPECT_EQ(mlp.size(), plain.size() + 2 * 3);
  for (const char* part : {"q_proj", "k_proj", "v_proj", "o_proj"})
    EXPECT_TRUE(attention.contains(fmt::format("model.layers.1.self_attn.{}.bias", part))) << part;
  for (const char* part : {"gate_proj", "up_proj", "down_proj"})
    EXPECT_TRUE(mlp.contains(fmt::format("model.layers.1.mlp.{}.bias", part))) << part;
}

TEST(ModelConfig, MistralAndQwen2HaveTheirOwnBiasesAndDefaults) {
  const auto plain = names_of(*make(llama_config()));
  EXPECT_EQ(names_of(*make(of_type("mistral"))), plain);
  auto biased = plain;
  for (const char* part : {"q_proj", "k_proj", "v_proj"})
    for (const int layer : {0, 1}) biased.insert(fmt::format("model.layers.{}.self_attn.{}.bias", layer, part));
  EXPECT_EQ(names_of(*make(of_type("qwen2"))), biased);
  const auto key_rows = [](json config) {
    config["num_attention_heads"] = 32;
    config["hidden_size"] = 64;
    const auto model = make(config);
    for (const Parameter* parameter : all_parameters(*model))
      if (parameter->name == "model.layers.0.self_attn.k_proj.weight") return parameter->shape[0];
    return std::int64_t{-1};
  };
  const auto without = [](json config) {
    config.erase("num_key_value_heads");
    return config;
  };
  EXPECT_EQ(key_rows(without(of_type("mistral"))), 8 * 2);
  EXPECT_EQ(key_rows(without(of_type("qwen2"))), 32 * 2);
  EXPECT_EQ(key_rows(with(of_type("mistral"), "num_key_value_heads", nullptr)), 32 * 2);
}

TEST(ModelConfig, NamesInWeightFilesAreMapped) {
  const auto bert = make(bert_config());
  const std::string norm = "bert.encoder.layer.0.output.LayerNorm";
  for (const std::string prefix : {"", "bert."}) {
    EXPECT_EQ(bert->map_weight_name(prefix + "encoder.layer.0.output.LayerNorm.weight"), norm + ".weight");
    EXPECT_EQ(bert->map_weight_name(prefix + "encoder.layer.0.output.LayerNorm.gamma"), norm + ".weight");
    EXPECT_EQ(bert->map_weight_name(prefix + "encoder.layer.0.output.LayerNorm.beta"), norm + ".bias");
    EXPECT_EQ(bert->map_weight_name(prefix + "pooler.dense.bias"), "bert.pooler.dense.bias");
    EXPECT_EQ(bert->map_weight_name(prefix + "embeddings.position_ids"), std::nullopt);
  }
  EXPECT_EQ(bert->map_weight_name("classifier.weight"), "classifier.weight");
  EXPECT_EQ(bert->map_weight_name("cls.predictions.bias"), "cls.predictions.bias");
  const auto untied = make(llama_config()), tied = make(with(llama_config(), "tie_word_embeddings", true));
  for (const std::string prefix : {"", "model."}) {
    EXPECT_EQ(untied->map_weight_name(prefix + "layers.1.mlp.up_proj.weight"), "model.layers.1.mlp.up_proj.weight");
    EXPECT_EQ(untied->map_weight_name(prefix + "norm.weight"), "model.norm.weight");
    EXPECT_EQ(untied->map_weight_name(prefix + "layers.0.self_attn.rotary_emb.inv_freq"), std::nullopt);
  }
  EXPECT_EQ(untied->map_weight_name("lm_head.weight"), "lm_head.weight");
  EXPECT_EQ(tied->map_weight_name("lm_head.weight"), "model.embed_tokens.weight");
  const auto gpt2 = make(gpt2_config());
  for (const std::string prefix : {"", "transformer."}) {
    EXPECT_EQ(gpt2->map_weight_name(prefix + "h.1.attn.c_attn.bias"), "transformer.h.1.attn.c_attn.bias");
    EXPECT_EQ(gpt2->map_weight_name(prefix + "h.1.attn.bias"), std::nullopt);
    EXPECT_EQ(gpt2->map_weight_name(prefix + "h.1.attn.masked_bias"), std::nullopt);
    EXPECT_EQ(gpt2->map_weight_name(prefix + "ln_f.weight"), "transformer.ln_f.weight");
  }
  EXPECT_EQ(gpt2->map_weight_name("lm_head.weight"), "transformer.wte.weight");
  EXPECT_EQ(make(with(gpt2_config(), "tie_word_embeddings", false))->map_weight_name("lm_head.weight"), "lm_head.weight");
}

TEST(ModelConfig, Gpt2InitialisesTheEndsOfResidualBranchesForItsDepth) {
  const auto model = make(gpt2_config());
  for (const Parameter* parameter : all_parameters(*model)) {
    if (parameter->init.kind != InitRule::Kind::normal) continue;
    const double expected = parameter->name.ends_with("c_proj.weight") ? 0.4 / 2 : 0.4;  // sqrt(2 x 2 layers)
    EXPECT_DOUBLE_EQ(parameter->init.deviation, expected) << parameter->name;
  }
}

// --- rotary frequencies
// -----------------------------------------------------------------------------------------------

// Recorded from transformers 5.23: LlamaConfig.from_dict(...), head size 8, then LlamaRotaryEmbedding.inv_freq.
TEST(RopeConfig, FrequenciesAreThoseOfTransformersWhateverTheSpelling) {
  const json llama3{{"rope_type", "llama3"}, {"factor", 8.0}, {"low_freq_factor", 1.0}, {"high_freq_factor", 4.0}};
  const json llama3_of_64 = with(llama3, "original_max_position_embeddings", 64);
  const json linear{{"type", "linear"}, {"factor", 2.0}};
  const std::vector<std::pair<json, std::vector<double>>> cases = {
      {json::object(), {1.0, 0.1, 0.01, 0.001}},
      {{{"rope_scaling", linear}}, {0.5, 0.05, 0.005, 0.0005}},
      {{{"rope_scaling", linear}, {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500.0}}}},
       {0.5, 0.05, 0.005, 0.0005}},
      {{{"rope_scaling", json::object()}, {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500.0}}}},
       {1.0, 0.211474, 0.044721, 0.009457}},
      {{{"rope_theta", 7.0}, {"rope_parameters", {{"rope_type", "default"}, {"rope_theta", 500.0}}}},
       {1.0, 0.211474, 0.044721, 0.009457}},
      {{{"rope_scaling", linear}, {"rope_theta", 500.0}}, {0.5, 0.105737, 0.022361, 0.004729}},
      {{{"rope_scaling", llama3}}, {1.0, 0.042751, 0.00125, 0.000125}},
      {{{"rope_scaling", llama3_of_64}}, {1.0, 0.013042, 0.00125, 0.000125}},
      {{{"rope_parameters", llama3_of_64}}, {1.0, 0.013042, 0.00125, 0.000125}},
      {{{"rope_scaling", llama3_of_64}, {"original_max_position_embeddings", 16}},
       {0.576056, 0.0125, 0.00125, 0.000125}}};
  for (auto [config, wanted] : cases) {
    config["max_position_embeddings"] = 128;
    const at::Tensor frequencies = read_inverse_frequencies(config, "config.json", 8);
    for (std::int64_t i = 0; i < 4; ++i)
      EXPECT_NEAR(frequencies[i].item<double>(), wanted[static_cast<std::size_t>(i)], 0.51e-6) << config.dump();
  }
}

TEST(RopeConfig, OtherTypesAreRefusedByName) {
  for (const char* type : {"dynamic", "yarn", "longrope", "proportional", "su"})
    for (const char* key : {"rope_scaling", "rope_parameters"})
      for (const char* spelling : {"rope_type", "type"})
        expect_refused(with(llama_config(), key, {{spelling, type}, {"factor", 2.0}}), fmt::format("'{}'", type));
  expect_refused(with(llama_config(), "rope_scaling", {{"type", "linear"}}), "factor");
  expect_refused(with(llama_config(), "rope_scaling", {{"rope_type", "llama3"}, {"factor", 8.0}}), "low_freq_factor");
  expect_refused(with(llama_config(), "rope_parameters", {{"full_attention", {{"rope_type", "default"}}}}),
                 "full_attention");
  expect_refused(
      with(llama_config(), "rope_scaling", {{"type", "linear"}, {"factor", 2.0}, {"partial_rotary_factor", 0.5}}),
      "partial_rotary_factor");
}

// Only refused if it is: building any of these would need the memory of a cluster, or forever.
TEST(ConfigLimits, SizesThatNoMachineHoldsAreRefusedByName) {
  constexpr std::int64_t kBeyond = 1LL << 31;
  for (const char* key :
       {"vocab_size", "hidden_size", "intermediate_size", "max_position_embeddings", "num_attention_heads"}) {
    for (const json& config : {bert_config(), llama_config()}) {
      expect_refused(with(config, key, kBeyond), fmt::format("'{}' is 2147483648", key));
      expect_refused(with(config, key, std::int64_t{1} << 62), fmt::format("'{}' is 4611686018427387904", key));
    }
  }
  for (const char* key : {"vocab_size", "n_embd", "n_inner", "n_positions", "n_head"})
    expect_refused(with(gpt2_config(), key, kBeyond), fmt::format("'{}' is 2147483648", key));
  expect_refused(with(gpt2_config(), "n_layer", 100'001), "'n_layer' is 100001");
  expect_refused(with(bert_config(), "type_vocab_size", kBeyond), "'type_vocab_size' is 2147483648");
  expect_refused(with(llama_config(), "num_key_value_heads", kBeyond), "'num_key_value_heads' is 2147483648");
  expect_refused(with(llama_config(), "head_dim", kBeyond), "'head_dim' is 2147483648");
  expect_refused(with(with(llama_config(), "head_dim", 1 << 16), "num_attention_heads", 1 << 20), "head_dim 65536");
  for (const json& config : {bert_config(), llama_config()})
    expect_refused(with(config, "num_hidden_layers", 100'001), "'num_hidden_layers' is 100001");
  json no_names = bert_config();
  no_names.erase("id2label");
  expect_refused(with(no_names, "num_labels", 1'000'001), "'num_labels' is 1000001");
}

}  // namespace
}  // namespace shardtune::testing
