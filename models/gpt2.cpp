// GPT-2 (Radford et al. 2019; transformers' GPT2LMHeadModel): learned positions, layer norm before each block, weight
// matrices stored [in, out] as its Conv1D has them, head tied to the embedding or not.
// Legend: T tokens of the row, D hidden size, H heads, K head size, F intermediate size, V vocabulary.
#include <cmath>
#include <deque>
#include <string_view>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "kernels/attention.hpp"
#include "kernels/dropout.hpp"
#include "kernels/embedding.hpp"
#include "kernels/linear.hpp"
#include "kernels/side_by_side.hpp"
#include "models/architectures.hpp"
#include "models/config_reader.hpp"
#include "models/model_parts.hpp"

namespace shardtune {
namespace {

constexpr std::int64_t kEmbeddingSite = 0;  // of dropout, see layer_site

struct Gpt2Config {
  std::int64_t vocab_size, hidden_size, num_layers, num_heads, intermediate_size, max_positions;
  double layer_norm_eps, initializer_range;
  double embedding_dropout, residual_dropout, attention_dropout;
  bool scales_attention, scales_by_layer, is_tied;
  Activation activation;
};

Gpt2Config read_config(const ModelRequest& request) {
  const ConfigReader in(*request.config, request.origin);
  in.refuse_unless("add_cross_attention", {"false"});
  in.refuse_unless("pruned_heads", {"{}"});
  in.refuse_unless("is_causal", {"true"});
  // Where a file has a size under both of its names the class takes the second.
  const auto name = [&](const char* own, const char* alias) { return in.has(alias) ? alias : own; };
  Gpt2Config config{};
  config.vocab_size = in.integer("vocab_size", 50257);
  config.hidden_size = in.integer(name("n_embd", "hidden_size"), 768, 1, ConfigReader::kMaxSize / 3);
  config.num_layers = in.num_layers(name("n_layer", "num_hidden_layers"), 12);
  config.num_heads = in.integer(name("n_head", "num_attention_heads"), 12);
  config.intermediate_size = in.integer("n_inner", 4 * config.hidden_size);
  config.max_positions = in.integer(name("n_positions", "max_position_embeddings"), 1024);
  config.layer_norm_eps = in.positive("layer_norm_epsilon", 1e-5);
  config.initializer_range = in.number("initializer_range", 0.02);
  config.activation = in.activation("activation_function", "gelu_new");
  config.scales_attention = in.flag("scale_attn_weights", true);
  config.scales_by_layer = in.flag("scale_attn_by_inverse_layer_idx", false);
  config.is_tied = in.flag("tie_word_embeddings", true);
  if (config.hidden_size % config.num_heads != 0)
    in.refuse(fmt::format("n_embd {} is not a multiple of n_head {}", config.hidden_size, config.num_heads));
  DropoutOverrides overrides(request);
  config.embedding_dropout = overrides.take("embd_pdrop", in.probability("embd_pdrop", 0.1));
  config.residual_dropout = overrides.take("resid_pdrop", in.probability("resid_pdrop", 0.1));
  config.attention_dropout = overrides.take("attn_pdrop", in.probability("attn_pdrop", 0.1));
  overrides.finish("GPT-2");
  return config;
}

// transformers' Conv1D: y = x W + b with W [in, out].
struct Conv1dParameters {
  Parameter *weight = nullptr, *bias = nullptr;
  LinearOperands operands() const { return {weight->value, bias->value, /*is_transposed=*/true}; }
  at::Tensor operator()(const at::Tensor& x) const { return apply_linears(x, {operands()}); }
};

struct Gpt2Layer {
  Unit* unit;
  LayerNormParameters norm_1, norm_2;
  Conv1dParameters query_key_value, attention_output, wide, output;
};

class Gpt2 : public Model {
 public:
  Gpt2(const Gpt2Config& config, nlohmann::json exported);

  std::vector<Unit*> units() override { return parts_.units(); }
  std::int64_t max_positions() const override { return config_.max_positions; }
  std::int64_t num_token_ids() const override { return config_.vocab_size; }
  bool uses_token_types() const override { return false; }
  nlohmann::json config_json() const override { return exported_; }
  bool is_head_parameter(const std::string& name) const override { return name == "lm_head.weight"; }
  std::optional<std::string> map_weight_name(const std::string& name_in_file) const override;
  ModelOutput forward(const Batch& batch, UnitRunner& runner, const ForwardContext& context,
                      const ForwardOptions& options) override;

 private:
  void add_layer(std::int64_t n);
  Conv1dParameters add_conv1d(Unit& unit, const std::string& name, std::vector<std::int64_t> sizes);
  at::Tensor run_layer(std::int64_t n, const at::Tensor& x_TD, AttentionOptions attention,
                       const ForwardContext& context) const;

  Gpt2Config config_;
  nlohmann::json exported_;
  ModelParts parts_;
  Parameter *embedding_ = nullptr, *position_ = nullptr, *head_ = nullptr;  // head_ == embedding_ when tied
  LayerNormParameters norm_;
  std::deque<Gpt2Layer> layers_;
};

Gpt2::Gpt2(const Gpt2Config& config, nlohmann::json exported)
    : config_(config), exported_(std::move(exported)), parts_(config.initializer_range) {
  Unit& root = parts_.add_unit("root", true);
  embedding_ = parts_.add_embedding(root, "transformer.wte", {config_.vocab_size, config_.hidden_size});
  position_ = parts_.add_embedding(root, "transformer.wpe", {config_.max_positions, config_.hidden_size});
  for (std::int64_t n = 0; n < config_.num_layers; ++n) add_layer(n);
  norm_ = parts_.add_layer_norm(root, "transformer.ln_f", config_.hidden_size, config_.layer_norm_eps);
  head_ = config_.is_tied ? embedding_
                          : parts_.add_weight(root, "lm_head.weight", {config_.vocab_size, config_.hidden_size});
}

Conv1dParameters Gpt2::add_conv1d(Unit& unit, const std::string& name, std::vector<std::int64_t> sizes) {
  const LinearParameters linear = parts_.add_linear(unit, name, std::move(sizes), true);
  linear.bias->shape = {linear.weight->shape.at(1)};
  // Both ends of the residual branches are initialised smaller, for the depth of the model.
  if (name.ends_with("c_proj"))
    linear.weight->init.deviation = config_.initializer_range / std::sqrt(2.0 * static_cast<double>(config_.num_layers));
  return {.weight = linear.weight, .bias = linear.bias};
}

void Gpt2::add_layer(std::int64_t n) {
  const std::string prefix = fmt::format("transformer.h.{}.", n);
  const std::int64_t size = config_.hidden_size, wide = config_.intermediate_size;
  Unit& unit = parts_.add_unit(fmt::format("layer.{}", n));
  Gpt2Layer layer{};
  layer.unit = &unit;
  layer.norm_1 = parts_.add_layer_norm(unit, prefix + "ln_1", size, config_.layer_norm_eps);
  layer.query_key_value = add_conv1d(unit, prefix + "attn.c_attn", {size, 3 * size});
  layer.attention_output = add_conv1d(unit, prefix + "attn.c_proj", {size, size});
  layer.norm_2 = parts_.add_layer_norm(unit, prefix + "ln_2", size, config_.layer_norm_eps);
  layer.wide = add_conv1d(unit, prefix + "mlp.c_fc", {size, wide});
  layer.output = add_conv1d(unit, prefix + "mlp.c_proj", {wide, size});
  layers_.push_back(layer);
}

at::Tensor Gpt2::run_layer(std::int64_t n, const at::Tensor& x_TD, AttentionOptions attention,
                           const ForwardContext& context) const {
  const Gpt2Layer& layer = layers_[static_cast<std::size_t>(n)];
  const std::int64_t tokens = x_TD.size(0), size = config_.hidden_size;
  attention.dropout = make_dropout_site(context, layer_site(n, 0), config_.attention_dropout);
  if (config_.scales_by_layer) attention.scale /= static_cast<double>(n + 1);
  const std::int64_t heads = config_.num_heads;
  const auto parts_THK = split_heads(layer.query_key_value(layer.norm_1(x_TD)), {heads, heads, heads});
  const at::Tensor mixed_TD =
      varlen_attention(parts_THK[0], parts_THK[1], parts_THK[2], attention).view({tokens, size});
  const auto residual_dropout = [&](std::int64_t place) {
    return make_dropout_site(context, layer_site(n, place), config_.residual_dropout);
  };
  const auto [normed_TD, middle_TD] = layer.norm_2({x_TD, layer.attention_output(mixed_TD), residual_dropout(1)});
  const at::Tensor wide_TF = apply_activated_linear(normed_TD, layer.wide.operands(), config_.activation);
  return add_dropout(middle_TD, layer.output(wide_TF), residual_dropout(2));
}

ModelOutput Gpt2::forward(const Batch& batch, UnitRunner& runner, const ForwardContext& context,
                          const ForwardOptions& options) {
  check_batch(batch, config_.max_positions);
  const double head_size = static_cast<double>(config_.hidden_size) / static_cast<double>(config_.num_heads);
  const AttentionOptions attention{.segment_offsets = shared_offsets(batch),
                                   .is_causal = true,
                                   .scale = config_.scales_attention ? 1.0 / std::sqrt(head_size) : 1.0,
                                   .dropout = {}};
  const auto tied = head_ == embedding_ && batch.labels.defined() ? std::make_shared<TiedGradient>() : nullptr;
  at::Tensor hidden_TD = embedding_lookup(batch.ids, embedding_->value, -1, tied) +
                         embedding_lookup(batch.positions, position_->value);
  hidden_TD = dropout(hidden_TD, make_dropout_site(context, kEmbeddingSite, config_.embedding_dropout));
  for (std::int64_t n = 0; n < config_.num_layers; ++n) {
    Unit& unit = *layers_[static_cast<std::size_t>(n)].unit;
    AttentionOptions own = attention;
    own.recompute = runner.recompute_context(unit);
    const auto layer_forward = [this, n, own, context](const UnitRunner::Tensors& in) -> UnitRunner::Tensors {
      return {run_layer(n, in[0], own, context)};
    };
    hidden_TD = runner.run(unit, {hidden_TD}, layer_forward)[0];
  }
  return run_causal_lm_head(norm_(hidden_TD), head_->value, batch, options, tied);
}

std::optional<std::string> Gpt2::map_weight_name(const std::string& name_in_file) const {
  // Old files hold the causal mask.
  if (name_in_file.ends_with(".attn.bias") || name_in_file.ends_with(".attn.masked_bias")) return std::nullopt;
  // A file may hold either name of the tied weight, or both.
  if (config_.is_tied && name_in_file == "lm_head.weight") return "transformer.wte.weight";
  for (const char* part : {"wte.", "wpe.", "h.", "ln_f."})
    if (name_in_file.starts_with(part)) return "transformer." + name_in_file;
  return name_in_file;
}

}  // namespace

std::unique_ptr<Model> make_gpt2(const ModelRequest& request) {
  const Gpt2Config config = read_config(request);
  nlohmann::json exported = exported_config(request, "GPT2LMHeadModel");
  exported["model_type"] = "gpt2";
  return std::make_unique<Gpt2>(config, std::move(exported));
}

}  // namespace shardtune
