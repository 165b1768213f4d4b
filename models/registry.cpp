#include <algorithm>
#include <string>
#include <vector>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "models/architectures.hpp"
#include "models/config_reader.hpp"
#include "models/model.hpp"

namespace shardtune {
namespace {

struct Architecture {
  const char* model_type;
  std::vector<const char*> classes;  // names in `architectures` that hold this body, whatever their head
  Task task;
  std::unique_ptr<Model> (*make)(const ModelRequest&);
};

const char* task_name(Task task) { return task == Task::text_classification ? "text-classification" : "causal-lm"; }

const std::vector<Architecture>& architectures() {
  static const std::vector<Architecture> table = {
      {"bert",
       {"BertModel", "BertForSequenceClassification", "BertForMaskedLM", "BertForPreTraining",
        "BertForNextSentencePrediction", "BertForTokenClassification", "BertForQuestionAnswering"},
       Task::text_classification,
       make_bert},
      {"gpt2",
       {"GPT2Model", "GPT2LMHeadModel", "GPT2DoubleHeadsModel", "GPT2ForSequenceClassification",
        "GPT2ForTokenClassification", "GPT2ForQuestionAnswering"},
       Task::causal_lm,
       make_gpt2},
      {"llama", {"LlamaModel", "LlamaForCausalLM"}, Task::causal_lm, make_llama},
      {"mistral", {"MistralModel", "MistralForCausalLM"}, Task::causal_lm, make_mistral},
      {"qwen2", {"Qwen2Model", "Qwen2ForCausalLM"}, Task::causal_lm, make_qwen2},
  };
  return table;
}

// model_type decides, as in transformers' Auto classes; the class name counts where a config has no model_type.
const Architecture* find(const std::string& class_name, const std::string& model_type) {
  for (const Architecture& entry : architectures()) {
    const bool has_class =
        std::any_of(entry.classes.begin(), entry.classes.end(), [&](const char* name) { return class_name == name; });
    if (model_type.empty() ? has_class : model_type == entry.model_type) return &entry;
  }
  return nullptr;
}

std::string first_class(const nlohmann::json& config, const ConfigReader& reader) {
  if (!reader.has("architectures")) return {};
  const nlohmann::json& names = config.at("architectures");
  if (!names.is_array() || names.empty() || !names[0].is_string())
    reader.refuse("'architectures' must be a list of class names");
  return names[0].get<std::string>();
}

}  // namespace

std::vector<std::string> supported_models() {
  std::vector<std::string> lines;
  for (const Architecture& entry : architectures())
    lines.push_back(
        fmt::format("{} ({}): {}", entry.model_type, fmt::join(entry.classes, ", "), task_name(entry.task)));
  return lines;
}

std::unique_ptr<Model> make_model(const ModelRequest& request) {
  check_internal(request.config != nullptr, "make_model needs a config");
  const nlohmann::json& config = *request.config;
  if (!config.is_object()) fail(ErrorKind::data, fmt::format("{}: expected a JSON object", request.origin));
  const ConfigReader reader(config, request.origin);
  const std::string class_name = first_class(config, reader), model_type = reader.text("model_type", "");
  const Architecture* found = find(class_name, model_type);
  if (found == nullptr)
    reader.refuse(fmt::format("architecture '{}' (model_type '{}') is not supported. Supported: {}", class_name,
                              model_type, fmt::join(supported_models(), "; ")));
  if (found->task != request.task)
    reader.refuse(fmt::format("task {} is not available for model_type '{}'; it offers {}. Supported: {}",
                              task_name(request.task), found->model_type, task_name(found->task),
                              fmt::join(supported_models(), "; ")));
  reader.refuse_unless("quantization_config", {});
  return found->make(request);
}

}  // namespace shardtune
