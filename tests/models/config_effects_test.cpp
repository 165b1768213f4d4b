// What a config changes in the numbers: dropout and the sliding window act where transformers has them.
#include <functional>
#include <map>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "models/model.hpp"
#include "models/unit.hpp"
#include "tests/models/config_support.hpp"
#include "tests/models/golden.hpp"

namespace shardtune::testing {
namespace {

using nlohmann::json;

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

// Segments of 5 and 3 tokens.
TEST(SlidingWindow, ActsOnTheLayersWhereTransformersHasIt) {
  const json mistral = of_type("mistral"), qwen2 = of_type("qwen2");
  const auto equal = [](const json& a, const json& b) { return at::equal(logits_of(a, false), logits_of(b, false)); };
  const json mistral_2 = with(mistral, "sliding_window", 2), mistral_none = with(mistral, "sliding_window", nullptr);
  EXPECT_TRUE(equal(mistral, mistral_none)) << "4096 by default";
  EXPECT_TRUE(equal(with(mistral, "sliding_window", 5), mistral_none));
  EXPECT_FALSE(equal(with(mistral, "sliding_window", 4), mistral_none));
  EXPECT_FALSE(equal(mistral_2, mistral_none));
  EXPECT_TRUE(equal(mistral_none, llama_config()));

  const json unused = with(with(qwen2, "sliding_window", 2), "max_window_layers", 0);
  EXPECT_TRUE(equal(unused, qwen2)) << "off by default";
  const json used = with(unused, "use_sliding_window", true);
  const auto windowed_from = [&](int layer) { return with(used, "max_window_layers", layer); };
  EXPECT_FALSE(equal(used, qwen2));
  EXPECT_FALSE(equal(windowed_from(1), qwen2));
  EXPECT_FALSE(equal(windowed_from(1), used));
  EXPECT_TRUE(equal(windowed_from(2), qwen2));
  json by_default = used;
  by_default.erase("max_window_layers");
  EXPECT_TRUE(equal(by_default, qwen2)) << "28 layers without a window";
  EXPECT_TRUE(equal(with(used, "layer_types", {"full_attention", "sliding_attention"}), windowed_from(1)));
  EXPECT_TRUE(equal(with(used, "layer_types", {"full_attention", "full_attention"}), qwen2));
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

// transformers' attribute_map: the common name is the same field and, being read last, is the one that counts.
TEST(ModelSizes, OfGpt2MayHaveTheirCommonNames) {
  const auto both = [](const char* own, const char* common, int value) {
    json config = with(gpt2_config(), common, value);
    EXPECT_TRUE(at::equal(logits_of(config, false), logits_of(with(gpt2_config(), own, value), false))) << common;
    config.erase(own);
    EXPECT_TRUE(at::equal(logits_of(config, false), logits_of(with(gpt2_config(), own, value), false))) << common;
  };
  both("n_head", "num_attention_heads", 6);
  both("n_layer", "num_hidden_layers", 1);
  both("n_embd", "hidden_size", 24);
  EXPECT_EQ(make(with(gpt2_config(), "max_position_embeddings", 8), {})->max_positions(), 8);
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
