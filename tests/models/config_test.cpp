// What config.json decides: architecture, parameters, rotary frequencies, refusals; dropout at transformers' places.
#include <functional>
#include <map>
#include <memory>
#include <set>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "models/model.hpp"
#include "models/rope_config.hpp"
#include "models/unit.hpp"
#include "tests/models/golden.hpp"

namespace shardtune::testing {
namespace {

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
json gpt2_config() {
  return {{"model_type", "gpt2"}, {"vocab_size", 31},  {"n_embd", 12},      {"n_layer", 2},      {"n_head", 3},
          {"n_positions", 16},    {"embd_pdrop", 0.0}, {"resid_pdrop", 0.0}, {"attn_pdrop", 0.0}, {"initializer_range", 0.4}};
}

ModelRequest request_for(json& config, std::map<std::string, double> dropout = {}) {
  const std::string type = config.value("model_type", "");
  return {.config = &config,
          .origin = "dir/config.json",
          .task = type == "llama" || type == "gpt2" ? Task::causal_lm : Task::text_classification,
          .labels = {},
          .dropout = std::move(dropout)};
}
std::unique_ptr<Model> make(json config, std::map<std::string, double> dropout = {}) {
  return make_model(request_for(config, std::move(dropout)));
}
json with(json config, const char* key, const json& value) {
  config[key] = value;
  return config;
}

void expect_refused(const json& config, const std::string& named, std::map<std::string, double> dropout = {}) {
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
                                                           {"no_rope_layers", {1, 0}},
                                                           {"partial_rotary_factor", 0.5},
                                                           {"hidden_act", "relu2"},
                                                           {"head_dim", 5},
                                                           {"num_key_value_heads", 2},
                                                           {"quantization_config", {{"bits", 4}}},
                                                           {"attention_dropout", -0.1}};
  for (const auto& [key, value] : llama) expect_refused(with(llama_config(), key, value), key);
  const std::vector<std::pair<const char*, json>> gpt2 = {{"add_cross_attention", true},
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
  // transformers would run Mistral, with its sliding window.
  expect_refused({{"model_type", "mistral"}, {"architectures", {"LlamaForCausalLM"}}}, "model_type 'mistral'");
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

// --- dropout
// -----------------------------------------------------------------------------------------------------------

Batch small_batch(bool has_token_types) {
  Batch batch;
  batch.ids = at::tensor({3, 1, 4, 1, 5, 9, 2, 6}, at::kLong);
  batch.positions = at::tensor({0, 1, 2, 3, 4, 0, 1, 2}, at::kLong);
  batch.segment_offsets = {0, 5, 8};
  batch.example_index = {0, 1};
  if (has_token_types) batch.token_types = at::tensor({0, 0, 0, 1, 1, 0, 1, 1}, at::kLong);
  return batch;
}

using Edit = std::function<void(Parameter&)>;

at::Tensor logits_of(const json& config, bool is_training, const Edit& edit = {},
                     std::map<std::string, double> dropout = {}) {
  at::NoGradGuard no_grad;
  const auto model = make(config, std::move(dropout));
  for (Unit* unit : model->units()) materialize(*unit, at::kFloat, 7);
  for (Parameter* parameter : all_parameters(*model)) {
    // No bias or norm weight may hide behind its initial 0 or 1.
    if (parameter->shape.size() == 1) parameter->value += 0.1 * at::arange(1, parameter->numel() + 1).to(at::kFloat);
    if (edit) edit(*parameter);
  }
  PlainRunner runner;
  const ForwardContext context{.is_training = is_training, .seed = 1, .step = 2, .micro_batch = 3};
  return model->forward(small_batch(model->uses_token_types()), runner, context, {.want_logits = true}).logits;
}

Edit zero_where(const std::vector<std::string>& parts) {
  return [parts](Parameter& parameter) {
    for (const std::string& part : parts)
      if (parameter.name.find(part) != std::string::npos) parameter.value.zero_();
  };
}

// Dropping everything at a place equals a model whose weights make that place zero.
TEST(ModelDropout, ActsWhereTransformersHasIt) {
  const json bert = bert_config(), llama = llama_config();
  const auto dropped_all = [](const json& config, const char* key) { return logits_of(with(config, key, 1.0), true); };
  json hidden = with(bert, "classifier_dropout", 0.0);
  EXPECT_TRUE(at::equal(dropped_all(hidden, "hidden_dropout_prob"),
                        logits_of(bert, false, zero_where({"embeddings.LayerNorm", "output.dense"}))))
      << "after the embeddings' norm, after both output projections and before the residual";
  EXPECT_TRUE(
      at::equal(dropped_all(bert, "attention_probs_dropout_prob"), logits_of(bert, false, zero_where({"self.value"}))));
  const at::Tensor no_pooled = logits_of(bert, false, zero_where({"classifier.weight"}));
  EXPECT_TRUE(at::equal(dropped_all(bert, "classifier_dropout"), no_pooled));
  EXPECT_TRUE(at::equal(dropped_all(bert, "hidden_dropout_prob"), no_pooled)) << "the classifier's default";
  EXPECT_TRUE(at::equal(dropped_all(llama, "attention_dropout"), logits_of(llama, false, zero_where({"v_proj"}))));
  const json gpt2 = with(gpt2_config(), "tie_word_embeddings", false);
  EXPECT_TRUE(at::equal(dropped_all(gpt2, "embd_pdrop"), logits_of(gpt2, false, zero_where({"wte", "wpe"}))));
  const Edit zero_values = [](Parameter& parameter) {
    if (parameter.name.find("c_attn") != std::string::npos) parameter.value.narrow(-1, 24, 12).zero_();
  };
  EXPECT_TRUE(at::equal(dropped_all(gpt2, "attn_pdrop"), logits_of(gpt2, false, zero_values)));
  EXPECT_TRUE(at::equal(dropped_all(gpt2, "resid_pdrop"), logits_of(gpt2, false, zero_where({"c_proj"}))));
}

TEST(ModelDropout, EveryPlaceMattersAtHuggingFacesDefaultsAndNoneInEvaluation) {
  json bert = bert_config();
  bert.erase("hidden_dropout_prob");
  bert.erase("attention_probs_dropout_prob");  // 0.1 each
  const at::Tensor calm = logits_of(bert_config(), true);
  EXPECT_TRUE(at::equal(logits_of(bert, false), calm));
  EXPECT_FALSE(at::equal(logits_of(bert, true), calm));
  for (const char* key : {"hidden_dropout_prob", "attention_probs_dropout_prob", "classifier_dropout"})
    EXPECT_FALSE(at::equal(logits_of(with(bert_config(), key, 0.1), true), calm)) << key;
  EXPECT_FALSE(
      at::equal(logits_of(with(llama_config(), "attention_dropout", 0.1), true), logits_of(llama_config(), true)));
  for (const char* key : {"embd_pdrop", "resid_pdrop", "attn_pdrop"})
    EXPECT_FALSE(at::equal(logits_of(with(gpt2_config(), key, 0.1), true), logits_of(gpt2_config(), true))) << key;
  EXPECT_TRUE(
      at::equal(logits_of(with(llama_config(), "attention_dropout", 0.1), false), logits_of(llama_config(), true)));
}

TEST(ModelDropout, OptionsOverrideTheConfigAndUnknownOnesAreRefused) {
  const json noisy = with(with(bert_config(), "hidden_dropout_prob", 0.5), "attention_probs_dropout_prob", 0.5);
  const std::map<std::string, double> off{{"hidden_dropout_prob", 0.0}, {"attention_probs_dropout_prob", 0.0}};
  EXPECT_TRUE(at::equal(logits_of(noisy, true, {}, off), logits_of(bert_config(), true)));
  EXPECT_EQ(make(noisy, off)->config_json().at("hidden_dropout_prob"), 0.0) << "the exported model says so";
  expect_refused(bert_config(), "attention_dropout", {{"attention_dropout", 0.1}});
  expect_refused(llama_config(), "hidden_dropout_prob", {{"hidden_dropout_prob", 0.1}});
  expect_refused(llama_config(), "attention_dropout", {{"attention_dropout", 2.0}});
}

}  // namespace
}  // namespace shardtune::testing
