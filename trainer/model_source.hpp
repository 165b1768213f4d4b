#pragma once
// From the user's options to a model, its tokenizer and the place its weights come from.
#include <filesystem>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include <nlohmann/json.hpp>

#include "core/model_files.hpp"
#include "data/tokenizer.hpp"
#include "models/model.hpp"
#include "trainer/options.hpp"

namespace shardtune {

struct ModelSource {
  nlohmann::json config;                  // config.json
  std::filesystem::path config_file;      // where it was read, for messages
  std::filesystem::path weights_dir;      // Hugging Face layout, or an imported checkpoint, which has the names of the
                                          // file it was made of; empty: random initialisation or a checkpoint
  std::filesystem::path checkpoint_dir;   // a checkpoint-<step> of a run of ours; empty otherwise
  std::filesystem::path tokenizer_dir;    // empty when no tokenizer is known
};

// model_name_or_path may be a Hugging Face directory, a checkpoint-<step>, or an output directory (its exported model/).
// Error{data} for a missing directory or config.json, saying what was looked for, and for a checkpoint whose
// configuration or tokenizer are not those that were saved.
ModelSource find_model_source(const ModelOptions& options);

// Class names the config declares (id2label in index order); empty when it has none.
std::vector<std::string> config_labels(const nlohmann::json& config);

// The order labels have in training: the config's when it names the same set (a classifier trained further), otherwise
// the data's sorted order. As run_glue.py.
std::vector<std::string> training_labels(const nlohmann::json& config, const std::vector<std::string>& data_labels);

std::unique_ptr<Model> build_model(ModelSource& source, const ModelOptions& options, const std::vector<std::string>& labels);

std::unique_ptr<Tokenizer> build_tokenizer(const ModelSource& source);

// Error{config} when --max_seq_length exceeds what the model allows; 0 = the model's limit, or the tokenizer's if smaller.
std::int64_t resolve_max_length(const DataOptions& options, const Model& model, const ModelSource& source);

// Everything besides weights that an exported model or checkpoint carries: config.json and tokenizer files.
CompanionFiles companion_files(const Model& model, const ModelSource& source);

}  // namespace shardtune
