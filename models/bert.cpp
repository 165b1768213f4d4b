// BERT (Devlin et al. 2018) with a sequence-classification head: transformers' BertForSequenceClassification. Also the
// body of MiniLM and most sentence-transformers models.
// Legend: T tokens of the row, D hidden size, H heads, K head size, F intermediate size, S segments, C classes.
#include <cmath>
#include <deque>
#include <string_view>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "kernels/attention.hpp"
#include "kernels/cross_entropy.hpp"
#include "kernels/dropout.hpp"
#include "kernels/embedding.hpp"
#include "kernels/linear.hpp"
#include "kernels/side_by_side.hpp"
#include "models/architectures.hpp"
#include "models/config_reader.hpp"
#include "models/model_parts.hpp"

namespace shardtune {
namespace {

constexpr std::int64_t kEmbeddingSite = 0, kClassifierSite = 1;  // of dropout, see layer_site

struct BertConfig {
  std::int64_t vocab_size, hidden_size, num_layers, num_heads, intermediate_size, max_positions, type_vocab_size;
  std::int64_t padding_row;
  double layer_norm_eps, initializer_range;
  double hidden_dropout, attention_dropout, classifier_dropout;
  Activation activation;
  std::vector<std::string> labels;
};

BertConfig read_config(const ModelRequest& request) {
  const ConfigReader in(*request.config, request.origin);
  BertConfig config{};
  config.vocab_size = in.integer("vocab_size", 30522);
  config.hidden_size = in.integer("hidden_size", 768);
  config.num_layers = in.num_layers("num_hidden_layers", 12);
  config.num_heads = in.integer("num_attention_heads", 12);
  config.intermediate_size = in.integer("intermediate_size", 3072);
  config.max_positions = in.integer("max_position_embeddings", 512);
  config.type_vocab_size = in.integer("type_vocab_size", 2);
  config.padding_row = in.padding_row("pad_token_id", 0, config.vocab_size);
  config.layer_norm_eps = in.positive("layer_norm_eps", 1e-12);
  config.initializer_range = in.number("initializer_range", 0.02);
  config.activation = in.activation("hidden_act", "gelu");
  if (config.hidden_size % config.num_heads != 0)
    in.refuse(fmt::format("hidden_size {} is not a multiple of num_attention_heads {}", config.hidden_size,
                          config.num_heads));
  in.refuse_unless("position_embedding_type", {"\"absolute\""});
  in.refuse_unless("is_decoder", {"false"});
  in.refuse_unless("add_cross_attention", {"false"});
  in.refuse_unless("pruned_heads", {"{}"});
  in.refuse_unless("problem_type", {"\"single_label_classification\""});
  config.labels = classification_labels(request);
  if (config.labels.size() < 2)
    in.refuse("one label means regression in transformers, which is not implemented; give at least two classes");
  DropoutOverrides overrides(request);
  config.hidden_dropout = overrides.take("hidden_dropout_prob", in.probability("hidden_dropout_prob", 0.1));
  config.attention_dropout =
      overrides.take("attention_probs_dropout_prob", in.probability("attention_probs_dropout_prob", 0.1));
  config.classifier_dropout =
      overrides.take("classifier_dropout", in.probability("classifier_dropout", config.hidden_dropout));
  overrides.finish("BERT");
  return config;
}

struct BertLayer {
  Unit* unit;
  LinearParameters query, key, value, attention_output, intermediate, output;
  LayerNormParameters attention_norm, output_norm;
};

class Bert : public Model {
 public:
  Bert(const BertConfig& config, nlohmann::json exported)
      : config_(config), exported_(std::move(exported)), parts_(config.initializer_range) {
    Unit& root = parts_.add_unit("root", true);
    const std::int64_t size = config_.hidden_size;
    word_ =
        parts_.add_embedding(root, "bert.embeddings.word_embeddings", {config_.vocab_size, size}, config_.padding_row);
    position_ = parts_.add_embedding(root, "bert.embeddings.position_embeddings", {config_.max_positions, size});
    token_type_ = parts_.add_embedding(root, "bert.embeddings.token_type_embeddings", {config_.type_vocab_size, size});
    embedding_norm_ = parts_.add_layer_norm(root, "bert.embeddings.LayerNorm", size, config_.layer_norm_eps);
    for (std::int64_t n = 0; n < config_.num_layers; ++n) add_layer(n);
    pooler_ = parts_.add_linear(root, "bert.pooler.dense", {size, size}, true);
    classifier_ = parts_.add_linear(root, "classifier", {static_cast<std::int64_t>(config_.labels.size()), size}, true);
  }

  std::vector<Unit*> units() override { return parts_.units(); }
  std::int64_t max_positions() const override { return config_.max_positions; }
  std::int64_t num_token_ids() const override { return config_.vocab_size; }
  bool uses_token_types() const override { return true; }
  nlohmann::json config_json() const override { return exported_; }
  bool is_head_parameter(const std::string& name) const override {
    return name.starts_with("classifier.") || name.starts_with("bert.pooler.");
  }
  std::optional<std::string> map_weight_name(const std::string& name_in_file) const override;
  ModelOutput forward(const Batch& batch, UnitRunner& runner, const ForwardContext& context,
                      const ForwardOptions& options) override;

 private:
  void add_layer(std::int64_t n);
  at::Tensor embed(const Batch& batch, const ForwardContext& context) const;
  at::Tensor run_layer(std::int64_t n, const at::Tensor& hidden_TD, AttentionOptions attention,
                       const ForwardContext& context) const;

  BertConfig config_;
  nlohmann::json exported_;
  ModelParts parts_;
  Parameter *word_, *position_, *token_type_;
  LayerNormParameters embedding_norm_;
  std::deque<BertLayer> layers_;
  LinearParameters pooler_, classifier_;
};

void Bert::add_layer(std::int64_t n) {
  const std::string prefix = fmt::format("bert.encoder.layer.{}.", n);
  const std::int64_t size = config_.hidden_size, wide = config_.intermediate_size;
  Unit& unit = parts_.add_unit(fmt::format("layer.{}", n));
  BertLayer layer{};
  layer.unit = &unit;
  layer.query = parts_.add_linear(unit, prefix + "attention.self.query", {size, size}, true);
  layer.key = parts_.add_linear(unit, prefix + "attention.self.key", {size, size}, true);
  layer.value = parts_.add_linear(unit, prefix + "attention.self.value", {size, size}, true);
  layer.attention_output = parts_.add_linear(unit, prefix + "attention.output.dense", {size, size}, true);
  layer.attention_norm =
      parts_.add_layer_norm(unit, prefix + "attention.output.LayerNorm", size, config_.layer_norm_eps);
  layer.intermediate = parts_.add_linear(unit, prefix + "intermediate.dense", {wide, size}, true);
  layer.output = parts_.add_linear(unit, prefix + "output.dense", {size, wide}, true);
  layer.output_norm = parts_.add_layer_norm(unit, prefix + "output.LayerNorm", size, config_.layer_norm_eps);
  layers_.push_back(layer);
}

at::Tensor Bert::embed(const Batch& batch, const ForwardContext& context) const {
  const at::Tensor types = batch.token_types.defined() ? batch.token_types : at::zeros_like(batch.ids);
  at::Tensor x_TD = embedding_lookup(batch.ids, word_->value, config_.padding_row) +
                    embedding_lookup(types, token_type_->value) + embedding_lookup(batch.positions, position_->value);
  x_TD = embedding_norm_(x_TD);
  return dropout(x_TD, make_dropout_site(context, kEmbeddingSite, config_.hidden_dropout));
}

at::Tensor Bert::run_layer(std::int64_t n, const at::Tensor& hidden_TD, AttentionOptions attention,
                           const ForwardContext& context) const {
  const BertLayer& layer = layers_[static_cast<std::size_t>(n)];
  const std::int64_t tokens = hidden_TD.size(0), heads = config_.num_heads;
  const at::Tensor all_T3D =
      apply_linears(hidden_TD, {layer.query.operands(), layer.key.operands(), layer.value.operands()});
  const auto parts_THK = split_heads(all_T3D, {heads, heads, heads});
  attention.dropout = make_dropout_site(context, layer_site(n, 0), config_.attention_dropout);
  const at::Tensor mixed_THK = varlen_attention(parts_THK[0], parts_THK[1], parts_THK[2], attention);
  const auto hidden_dropout = [&](std::int64_t place) {
    return make_dropout_site(context, layer_site(n, place), config_.hidden_dropout);
  };
  const at::Tensor attended_TD = layer.attention_output(mixed_THK.view({tokens, -1}));
  const at::Tensor middle_TD = layer.attention_norm({hidden_TD, attended_TD, hidden_dropout(1)}).normed;
  const at::Tensor wide_TF = layer.intermediate.activated(middle_TD, config_.activation);
  return layer.output_norm({middle_TD, layer.output(wide_TF), hidden_dropout(2)}).normed;
}

ModelOutput Bert::forward(const Batch& batch, UnitRunner& runner, const ForwardContext& context,
                          const ForwardOptions& options) {
  check_batch(batch, config_.max_positions);
  const double head_size = static_cast<double>(config_.hidden_size) / static_cast<double>(config_.num_heads);
  const AttentionOptions attention{
      .segment_offsets = shared_offsets(batch), .scale = 1.0 / std::sqrt(head_size), .dropout = {}};
  at::Tensor hidden_TD = embed(batch, context);
  for (std::int64_t n = 0; n < config_.num_layers; ++n) {
    AttentionOptions own = attention;
    own.recompute = runner.recompute_context(*layers_[static_cast<std::size_t>(n)].unit);
    const auto layer_forward = [this, n, own, context](const UnitRunner::Tensors& in) -> UnitRunner::Tensors {
      return {run_layer(n, in[0], own, context)};
    };
    hidden_TD = runner.run(*layers_[static_cast<std::size_t>(n)].unit, {hidden_TD}, layer_forward)[0];
  }
  // HF pools the first token ([CLS]) of every example.
  const at::Tensor pooled_SD = at::tanh(pooler_(hidden_TD.index_select(0, segment_starts(batch))));
  const at::Tensor dropped_SD =
      dropout(pooled_SD, make_dropout_site(context, kClassifierSite, config_.classifier_dropout));
  ModelOutput output;
  // The small head is computed in fp32: rounding logits to bf16 would cost digits and save nothing.
  output.logits = apply_linear(dropped_SD.to(at::kFloat), classifier_.weight->value.to(at::kFloat),
                               classifier_.bias->value.to(at::kFloat));
  if (batch.labels.defined())
    output.loss_sum = cross_entropy_sum(output.logits, batch.labels, options.loss_scale, options.label_smoothing);
  return output;
}

std::optional<std::string> Bert::map_weight_name(const std::string& name_in_file) const {
  std::string name = name_in_file;
  const auto replace_end = [&](std::string_view old_end, std::string_view new_end) {
    if (name.ends_with(old_end)) name.replace(name.size() - old_end.size(), old_end.size(), new_end);
  };
  replace_end("LayerNorm.gamma", "LayerNorm.weight");  // files converted from TensorFlow
  replace_end("LayerNorm.beta", "LayerNorm.bias");
  if (name.ends_with("embeddings.position_ids") || name.ends_with("embeddings.token_type_ids")) return std::nullopt;
  for (const char* part : {"embeddings.", "encoder.", "pooler."})
    if (name.starts_with(part)) return "bert." + name;
  return name;
}

}  // namespace

std::unique_ptr<Model> make_bert(const ModelRequest& request) {
  const BertConfig config = read_config(request);
  nlohmann::json exported = exported_config(request, "BertForSequenceClassification");
  exported["model_type"] = "bert";
  exported["problem_type"] = "single_label_classification";
  exported["id2label"] = nlohmann::json::object();
  exported["label2id"] = nlohmann::json::object();
  for (std::size_t id = 0; id < config.labels.size(); ++id) {
    exported["id2label"][std::to_string(id)] = config.labels[id];
    exported["label2id"][config.labels[id]] = id;
  }
  exported.erase("num_labels");
  return std::make_unique<Bert>(config, std::move(exported));
}

}  // namespace shardtune
