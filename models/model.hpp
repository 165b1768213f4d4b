#pragma once
// The interface of every architecture with its task head. One file per architecture implements it.
// Not thread-safe. Knows nothing of ranks.
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "core/batch.hpp"
#include "models/unit.hpp"

namespace shardtune {

enum class Task { text_classification, causal_lm };

struct ModelOutput {
  // Sum (not mean) of the loss over labelled tokens or examples, fp32 scalar; undefined without labels.
  at::Tensor loss_sum;
  // fp32. Classification: [S, C]. Causal LM: [T, V], only when ForwardOptions::want_logits (never in training).
  at::Tensor logits;
};

struct ForwardOptions {
  bool want_logits = false;
  // The loss is multiplied by this before it is returned; the chunked head needs the factor in the forward pass.
  // Trainer: 1 / (labelled tokens or examples of the whole step).
  double loss_scale = 1.0;
  double label_smoothing = 0.0;  // of every loss, see kernels/cross_entropy.hpp
};

class Model {
 public:
  virtual ~Model() = default;
  // Root first, then layers in execution order. Stable addresses for the model's life.
  virtual std::vector<Unit*> units() = 0;
  virtual ModelOutput forward(const Batch& batch, UnitRunner& runner, const ForwardContext& context,
                              const ForwardOptions& options) = 0;
  // Longest segment the architecture can take (position table), in tokens.
  virtual std::int64_t max_positions() const = 0;
  virtual std::int64_t num_token_ids() const = 0;  // rows of the token table; a tokenizer may know fewer
  virtual bool uses_token_types() const = 0;
  // config.json of the exported model (architectures, id2label, dtype float32 ...), HF format.
  virtual nlohmann::json config_json() const = 0;
  // How names in a weight file map to ours: files of the base model have no `bert.` / `model.` prefix, old files use
  // gamma/beta. Returns our parameter name, or nullopt for a tensor to ignore silently (buffers: position_ids,
  // inv_freq) -- and the name unchanged when nothing fits (then it counts as unexpected). Two names in a file may map to
  // one parameter (tied weights stored twice); the loader sees to it that their values are equal.
  virtual std::optional<std::string> map_weight_name(const std::string& name_in_file) const = 0;
  // Parameters that a missing-tensor report may list as "newly initialised" (task heads, pooler).
  virtual bool is_head_parameter(const std::string& name) const = 0;
};

struct ModelRequest {
  nlohmann::json* config = nullptr;             // parsed config.json, not owned
  std::string origin;                           // its path, for messages
  Task task = Task::text_classification;
  std::vector<std::string> labels;              // class names for classification; empty = take the config's
  // Overrides of dropout probabilities by HF option name (hidden_dropout_prob, attention_probs_dropout_prob,
  // classifier_dropout, attention_dropout); unknown to the architecture = Error{config}.
  std::map<std::string, double> dropout;
};

// Finds the architecture by `model_type`, without one by `architectures[0]`. Error{config} listing what is supported
// otherwise. Every field of the config that changes the result and is not implemented is refused by name.
std::unique_ptr<Model> make_model(const ModelRequest& request);

// One line per supported model_type with its tasks, for --help and messages.
std::vector<std::string> supported_models();

// Fills `into` (fp32, the flat slice [offset, offset + into.numel()) of the parameter) with the parameter's HF
// initialisation: a pure function of (seed, name, element), the same however the parameter is cut.
void initialize_slice(const Parameter& parameter, std::uint64_t seed, std::int64_t offset, at::Tensor into);

}  // namespace shardtune
