#include "trainer/model_source.hpp"

#include <algorithm>
#include <set>

#include <fmt/format.h>

#include "checkpoint/checkpoint_store.hpp"
#include "core/error.hpp"
#include "core/json.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

Task parse_task(const std::string& name) {
  if (name == "text-classification") return Task::text_classification;
  if (name == "causal-lm") return Task::causal_lm;
  fail(ErrorKind::config, fmt::format("--task = {}: use text-classification or causal-lm", name));
}

fs::path config_file_of(const fs::path& path, const char* option) {
  if (!fs::exists(path))
    fail(ErrorKind::data, fmt::format("--{} = {}: no such file or directory", option, path.string()));
  const fs::path file = fs::is_directory(path) ? path / "config.json" : path;
  if (!fs::exists(file))
    fail(ErrorKind::data, fmt::format("--{} = {}: the directory has no config.json; it must hold a model in Hugging Face "
                                      "layout (config.json, model.safetensors, tokenizer.json)",
                                      option, path.string()));
  return file;
}

bool is_run_checkpoint(const fs::path& dir) {
  return fs::exists(dir / "manifest.json") && read_checkpoint_run_state(dir).contains("state");
}

}  // namespace

ModelSource find_model_source(const ModelOptions& options) {
  ModelSource source;
  if (!options.model_name_or_path.empty()) {
    fs::path dir = options.model_name_or_path;
    if (fs::exists(dir) && !fs::is_directory(dir))
      fail(ErrorKind::data, fmt::format("--model_name_or_path = {}: a directory is needed, not a file", dir.string()));
    if (!fs::exists(dir / "config.json") && fs::exists(dir / "model" / "config.json")) dir /= "model";
    source.config_file = config_file_of(dir, "model_name_or_path");
    check_side_files(dir);
    (is_run_checkpoint(dir) ? source.checkpoint_dir : source.weights_dir) = dir;
    source.tokenizer_dir = dir;
  } else {
    source.config_file = config_file_of(options.config_name, "config_name");
    check_side_files(source.config_file.parent_path());
    if (fs::exists(source.config_file.parent_path() / "tokenizer.json"))
      source.tokenizer_dir = source.config_file.parent_path();
  }
  if (!options.tokenizer_name.empty()) {
    source.tokenizer_dir = options.tokenizer_name;
    check_side_files(source.tokenizer_dir);
  }
  source.config = read_json_file(source.config_file);
  if (!source.config.is_object())
    fail(ErrorKind::data, fmt::format("{}: a JSON object is needed", source.config_file.string()));
  return source;
}

std::vector<std::string> config_labels(const nlohmann::json& config) {
  std::vector<std::string> labels;
  const auto map = config.find("id2label");
  if (map == config.end() || !map->is_object()) return labels;
  for (std::size_t i = 0; i < map->size(); ++i) {
    const auto name = map->find(std::to_string(i));
    if (name == map->end() || !name->is_string()) return {};
    labels.push_back(name->get<std::string>());
  }
  return labels;
}

std::vector<std::string> training_labels(const nlohmann::json& config, const std::vector<std::string>& data_labels) {
  const std::vector<std::string> known = config_labels(config);
  if (std::set<std::string>(known.begin(), known.end()) == std::set<std::string>(data_labels.begin(), data_labels.end()))
    return known;
  return data_labels;
}

std::unique_ptr<Model> build_model(ModelSource& source, const ModelOptions& options, const std::vector<std::string>& labels) {
  return make_model({.config = &source.config,
                     .origin = source.config_file.string(),
                     .task = parse_task(options.task),
                     .labels = labels,
                     .dropout = options.dropout});
}

std::unique_ptr<Tokenizer> build_tokenizer(const ModelSource& source) {
  if (source.tokenizer_dir.empty())
    fail(ErrorKind::config, "no tokenizer: give --tokenizer_name DIR with a tokenizer.json");
  if (!fs::exists(source.tokenizer_dir / "tokenizer.json"))
    fail(ErrorKind::data, fmt::format("{} has no tokenizer.json; give --tokenizer_name DIR with one (in Python: "
                                      "AutoTokenizer.from_pretrained(...).save_pretrained(DIR) writes it)",
                                      source.tokenizer_dir.string()));
  return load_tokenizer(source.tokenizer_dir);
}

std::int64_t resolve_max_length(const DataOptions& options, const Model& model, const ModelSource& source) {
  const std::int64_t limit = model.max_positions();
  if (options.max_seq_length > limit)
    fail(ErrorKind::config, fmt::format("--max_seq_length = {}: the model allows sequences of at most {} tokens ({})",
                                        options.max_seq_length, limit, source.config_file.string()));
  if (options.max_seq_length > 0) return options.max_seq_length;
  std::int64_t length = limit;
  const fs::path file = source.tokenizer_dir / "tokenizer_config.json";
  if (!source.tokenizer_dir.empty() && fs::exists(file)) {
    const nlohmann::json config = read_json_file(file);
    // Hugging Face writes 1e30 (a float) for "no limit".
    const double stored = json_get_or<double>(config, "model_max_length", 0, file.string());
    if (stored >= 1 && stored < static_cast<double>(length)) length = static_cast<std::int64_t>(stored);
  }
  return length;
}

CompanionFiles companion_files(const Model& model, const ModelSource& source) {
  CompanionFiles files{{"config.json", model.config_json().dump(2) + "\n"}};
  if (!source.tokenizer_dir.empty())
    for (auto& file : tokenizer_files(source.tokenizer_dir)) files.push_back(std::move(file));
  return files;
}

}  // namespace shardtune
