// Llama (Touvron et al. 2023; transformers' LlamaForCausalLM): RMS norm, rotary positions, grouped queries, gated MLP,
// tied or untied head. Mistral (Jiang et al. 2023) and Qwen2 (Yang et al. 2024) are the same with other defaults, a
// sliding window, and for Qwen2 biases of queries, keys and values.
// Legend: T tokens of the row, D hidden size, H query heads, G key/value heads, K head size, F intermediate size,
// V vocabulary, N = (H + 2 G) K.
#include <cmath>
#include <deque>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "kernels/attention.hpp"
#include "kernels/embedding.hpp"
#include "kernels/gated_mlp.hpp"
#include "kernels/norm.hpp"
#include "kernels/rope.hpp"
#include "kernels/side_by_side.hpp"
#include "models/architectures.hpp"
#include "models/config_reader.hpp"
#include "models/model_parts.hpp"
#include "models/rope_config.hpp"

namespace shardtune {
namespace {

// What the families differ in; numbers are the defaults of transformers' configuration classes.
struct Family {
  const char *name, *model_type, *class_name;
  std::int64_t vocab_size, intermediate_size, num_kv_heads, max_positions;  // num_kv_heads 0: as many as heads
};
constexpr Family kLlama{"Llama", "llama", "LlamaForCausalLM", 32000, 11008, 0, 2048};
constexpr Family kMistral{"Mistral", "mistral", "MistralForCausalLM", 32000, 14336, 8, 131072};
constexpr Family kQwen2{"Qwen2", "qwen2", "Qwen2ForCausalLM", 151936, 22016, 32, 32768};

struct LlamaConfig {
  std::int64_t vocab_size, hidden_size, intermediate_size, num_layers, num_heads, num_kv_heads, head_size;
  std::int64_t max_positions, padding_row;
  double rms_norm_eps, initializer_range, attention_dropout;
  bool qkv_bias, output_bias, mlp_bias, is_tied;
  Activation activation;
  std::vector<std::int64_t> windows;  // of each layer; 0 = none
  at::Tensor inverse_frequencies;     // [K / 2] fp32
};

void refuse_what_llama_lacks(const ConfigReader& in) {
  in.refuse_unless("attn_logit_softcapping", {});
  in.refuse_unless("final_logit_softcapping", {});
  in.refuse_unless("use_qk_norm", {"false"});
  in.refuse_unless("qk_norm", {"false"});
  in.refuse_unless("no_rope_layers", {});
  in.refuse_unless("is_decoder", {"true", "false"});
  in.refuse_unless("add_cross_attention", {"false"});
  in.refuse_unless("is_causal", {"true"});
}

// In these families null means another thing than a missing field, which takes the class's default.
bool is_null(const nlohmann::json& config, const char* key) { return config.contains(key) && config.at(key).is_null(); }

std::int64_t read_sliding_window(const nlohmann::json& config, const ConfigReader& in) {
  return is_null(config, "sliding_window") ? 0 : in.integer("sliding_window", 4096);
}

std::vector<std::int64_t> read_qwen2_windows(const nlohmann::json& config, const ConfigReader& in,
                                             std::int64_t num_layers) {
  const std::int64_t window = in.flag("use_sliding_window", false) ? read_sliding_window(config, in) : 0,
                     first = in.integer("max_window_layers", 28, 0);
  std::vector<std::int64_t> windows(static_cast<std::size_t>(num_layers), 0);
  if (!in.has("layer_types")) {
    for (std::int64_t n = first; n < num_layers; ++n) windows[static_cast<std::size_t>(n)] = window;
    return windows;
  }
  const nlohmann::json& types = config.at("layer_types");
  if (!types.is_array() || types.size() != windows.size())
    in.refuse(fmt::format("'layer_types' must be a list of {} names, one for each layer", num_layers));
  for (std::size_t n = 0; n < windows.size(); ++n) {
    if (types[n] == "full_attention") continue;
    if (types[n] != "sliding_attention")
      in.refuse(fmt::format("'layer_types' holds {}; supported: full_attention, sliding_attention", types[n].dump()));
    if (window == 0)
      in.refuse("'layer_types' holds sliding_attention, which needs use_sliding_window and sliding_window");
    windows[n] = window;
  }
  return windows;
}

// Biases and windows, where the families differ.
void read_family(const Family& family, const nlohmann::json& json, const ConfigReader& in, LlamaConfig& config) {
  const bool is_llama = &family == &kLlama, is_qwen2 = &family == &kQwen2;
  config.windows.assign(static_cast<std::size_t>(config.num_layers), 0);
  if (is_qwen2) {
    config.windows = read_qwen2_windows(json, in, config.num_layers);
  } else {
    // transformers makes another model (Ministral) of a Mistral with layer types.
    in.refuse_unless("layer_types", {});
    in.refuse_unless("use_sliding_window", {"false"});
    if (is_llama)
      in.refuse_unless("sliding_window", {});
    else
      config.windows.assign(config.windows.size(), read_sliding_window(json, in));
  }
  if (!is_llama) {
    in.refuse_unless("attention_bias", {is_qwen2 ? "true" : "false"});
    in.refuse_unless("mlp_bias", {"false"});
  }
  config.qkv_bias = in.flag("attention_bias", is_qwen2);
  config.output_bias = is_llama && config.qkv_bias;
  config.mlp_bias = in.flag("mlp_bias", false);
}

LlamaConfig read_config(const ModelRequest& request, const Family& family) {
  const ConfigReader in(*request.config, request.origin);
  refuse_what_llama_lacks(in);
  LlamaConfig config{};
  config.vocab_size = in.integer("vocab_size", family.vocab_size);
  config.hidden_size = in.integer("hidden_size", 4096);
  config.intermediate_size = in.integer("intermediate_size", family.intermediate_size);
  config.num_layers = in.num_layers("num_hidden_layers", 32);
  config.num_heads = in.integer("num_attention_heads", 32);
  const bool as_heads = family.num_kv_heads == 0 || is_null(*request.config, "num_key_value_heads");
  config.num_kv_heads = in.integer("num_key_value_heads", as_heads ? config.num_heads : family.num_kv_heads);
  if (!in.has("head_dim") && config.hidden_size % config.num_heads != 0)
    in.refuse(fmt::format("hidden_size {} is not a multiple of num_attention_heads {} and head_dim is not given",
                          config.hidden_size, config.num_heads));
  constexpr std::int64_t kMaxHeadSize = 1 << 16;  // the table of frequencies is made at once
  config.head_size = in.integer("head_dim", config.hidden_size / config.num_heads, 2, kMaxHeadSize);
  if (config.num_heads > ConfigReader::kMaxSize / config.head_size)
    in.refuse(fmt::format("num_attention_heads {} x head_dim {} is more than {}", config.num_heads, config.head_size,
                          ConfigReader::kMaxSize));
  if (config.head_size % 2 != 0) in.refuse(fmt::format("'head_dim' is {}, it must be even", config.head_size));
  if (config.num_heads % config.num_kv_heads != 0)
    in.refuse(fmt::format("num_attention_heads {} is not a multiple of num_key_value_heads {}", config.num_heads,
                          config.num_kv_heads));
  config.max_positions = in.integer("max_position_embeddings", family.max_positions);
  config.padding_row = in.padding_row("pad_token_id", -1, config.vocab_size);
  config.rms_norm_eps = in.positive("rms_norm_eps", 1e-6);
  config.initializer_range = in.number("initializer_range", 0.02);
  read_family(family, *request.config, in, config);
  config.is_tied = in.flag("tie_word_embeddings", false);
  config.activation = in.activation("hidden_act", "silu");
  nlohmann::json settled = *request.config;  // some rope types start from this length
  settled["max_position_embeddings"] = config.max_positions;
  config.inverse_frequencies = read_inverse_frequencies(settled, request.origin, config.head_size);
  DropoutOverrides overrides(request);
  config.attention_dropout = overrides.take("attention_dropout", in.probability("attention_dropout", 0.0));
  overrides.finish(family.name);
  return config;
}

struct LlamaLayer {
  Unit* unit;
  Parameter *input_norm, *post_attention_norm;
  LinearParameters query, key, value, output, gate, up, down;
  std::int64_t window;  // 0 = none
};

class Llama : public Model {
 public:
  Llama(const LlamaConfig& config, nlohmann::json exported);

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
  at::Tensor attend(const LlamaLayer& layer, const at::Tensor& x_TD, const AttentionOptions& attention,
                    const RopeTables& tables) const;
  at::Tensor run_mlp(const LlamaLayer& layer, const at::Tensor& x_TD) const;

  LlamaConfig config_;
  nlohmann::json exported_;
  ModelParts parts_;
  Parameter *embedding_ = nullptr, *norm_ = nullptr, *head_ = nullptr;  // head_ == embedding_ when tied
  std::deque<LlamaLayer> layers_;
};

Llama::Llama(const LlamaConfig& config, nlohmann::json exported)
    : config_(config), exported_(std::move(exported)), parts_(config.initializer_range) {
  Unit& root = parts_.add_unit("root", true);
  embedding_ =
      parts_.add_embedding(root, "model.embed_tokens", {config_.vocab_size, config_.hidden_size}, config_.padding_row);
  for (std::int64_t n = 0; n < config_.num_layers; ++n) add_layer(n);
  norm_ = parts_.add_rms_norm(root, "model.norm", config_.hidden_size);
  head_ = config_.is_tied ? embedding_
                          : parts_.add_weight(root, "lm_head.weight", {config_.vocab_size, config_.hidden_size});
}

void Llama::add_layer(std::int64_t n) {
  const std::string prefix = fmt::format("model.layers.{}.", n);
  const std::int64_t size = config_.hidden_size, wide = config_.intermediate_size;
  const std::int64_t queries = config_.num_heads * config_.head_size, keys = config_.num_kv_heads * config_.head_size;
  Unit& unit = parts_.add_unit(fmt::format("layer.{}", n));
  LlamaLayer layer{};
  layer.unit = &unit;
  layer.input_norm = parts_.add_rms_norm(unit, prefix + "input_layernorm", size);
  const bool bias = config_.qkv_bias;
  layer.query = parts_.add_linear(unit, prefix + "self_attn.q_proj", {queries, size}, bias);
  layer.key = parts_.add_linear(unit, prefix + "self_attn.k_proj", {keys, size}, bias);
  layer.value = parts_.add_linear(unit, prefix + "self_attn.v_proj", {keys, size}, bias);
  layer.output = parts_.add_linear(unit, prefix + "self_attn.o_proj", {size, queries}, config_.output_bias);
  layer.post_attention_norm = parts_.add_rms_norm(unit, prefix + "post_attention_layernorm", size);
  layer.gate = parts_.add_linear(unit, prefix + "mlp.gate_proj", {wide, size}, config_.mlp_bias);
  layer.up = parts_.add_linear(unit, prefix + "mlp.up_proj", {wide, size}, config_.mlp_bias);
  layer.down = parts_.add_linear(unit, prefix + "mlp.down_proj", {size, wide}, config_.mlp_bias);
  layer.window = config_.windows[static_cast<std::size_t>(n)];
  layers_.push_back(layer);
}

at::Tensor Llama::attend(const LlamaLayer& layer, const at::Tensor& x_TD, const AttentionOptions& attention,
                         const RopeTables& tables) const {
  const at::Tensor all_TN = apply_linears(x_TD, {layer.query.operands(), layer.key.operands(), layer.value.operands()});
  const auto parts = split_heads(all_TN, {config_.num_heads, config_.num_kv_heads, config_.num_kv_heads});
  // Attention keeps the values until backward: not all of the product for their sake.
  const at::Tensor v_TGK = parts[2].contiguous();
  const at::Tensor mixed_THK = varlen_attention(rope(parts[0], tables), rope(parts[1], tables), v_TGK, attention);
  return layer.output(mixed_THK.view({x_TD.size(0), -1}));
}

at::Tensor Llama::run_mlp(const LlamaLayer& layer, const at::Tensor& x_TD) const {
  const at::Tensor gate_up_T2F = apply_linears(x_TD, {layer.gate.operands(), layer.up.operands()});
  if (config_.activation == Activation::silu) return layer.down(silu_and_mul(gate_up_T2F));
  const auto parts_TF = split_columns(gate_up_T2F, {config_.intermediate_size, config_.intermediate_size});
  return layer.down(activate(parts_TF[0], config_.activation) * parts_TF[1]);
}

ModelOutput Llama::forward(const Batch& batch, UnitRunner& runner, const ForwardContext& context,
                           const ForwardOptions& options) {
  check_batch(batch, config_.max_positions);
  const AttentionOptions attention{.segment_offsets = shared_offsets(batch),
                                   .is_causal = true,
                                   .scale = 1.0 / std::sqrt(static_cast<double>(config_.head_size)),
                                   .dropout = {}};
  const RopeTables tables = make_rope_tables(batch.positions, config_.inverse_frequencies);
  const auto tied = head_ == embedding_ && batch.labels.defined() ? std::make_shared<TiedGradient>() : nullptr;
  at::Tensor hidden_TD = embedding_lookup(batch.ids, embedding_->value, config_.padding_row, tied);
  for (std::int64_t n = 0; n < config_.num_layers; ++n) {
    const LlamaLayer& layer = layers_[static_cast<std::size_t>(n)];
    AttentionOptions own = attention;
    own.window = layer.window;
    own.dropout = make_dropout_site(context, layer_site(n, 0), config_.attention_dropout);
    own.recompute = runner.recompute_context(*layer.unit);
    const auto layer_forward = [this, &layer, own, tables](const UnitRunner::Tensors& in) -> UnitRunner::Tensors {
      const at::Tensor mixed_TD =
          attend(layer, rms_norm(in[0], layer.input_norm->value, config_.rms_norm_eps), own, tables);
      const auto [normed_TD, middle_TD] =
          add_rms_norm({in[0], mixed_TD}, layer.post_attention_norm->value, config_.rms_norm_eps);
      return {middle_TD + run_mlp(layer, normed_TD)};
    };
    hidden_TD = runner.run(*layer.unit, {hidden_TD}, layer_forward)[0];
  }
  hidden_TD = rms_norm(hidden_TD, norm_->value, config_.rms_norm_eps);
  return run_causal_lm_head(hidden_TD, head_->value, batch, options, tied);
}

std::optional<std::string> Llama::map_weight_name(const std::string& name_in_file) const {
  if (name_in_file.ends_with("rotary_emb.inv_freq")) return std::nullopt;
  // A file may hold either name of the tied weight, or both.
  if (config_.is_tied && name_in_file == "lm_head.weight") return "model.embed_tokens.weight";
  for (const char* part : {"embed_tokens.", "layers.", "norm."})
    if (name_in_file.starts_with(part)) return "model." + name_in_file;
  return name_in_file;
}

std::unique_ptr<Model> make(const ModelRequest& request, const Family& family) {
  const LlamaConfig config = read_config(request, family);
  nlohmann::json exported = exported_config(request, family.class_name);
  exported["model_type"] = family.model_type;
  return std::make_unique<Llama>(config, std::move(exported));
}

}  // namespace

std::unique_ptr<Model> make_llama(const ModelRequest& request) { return make(request, kLlama); }
std::unique_ptr<Model> make_mistral(const ModelRequest& request) { return make(request, kMistral); }
std::unique_ptr<Model> make_qwen2(const ModelRequest& request) { return make(request, kQwen2); }

}  // namespace shardtune
