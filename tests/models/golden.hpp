#pragma once
// A golden case of tests/golden: what make_golden.py recorded from transformers, and our model with the same weights.
#include <map>
#include <memory>
#include <string>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "core/batch.hpp"
#include "models/model.hpp"

namespace shardtune::testing {

struct Golden {
  std::map<std::string, at::Tensor> tensors;  // as in the file; integers int64
  nlohmann::json config;
  std::unique_ptr<Model> model;  // values: the recorded weights as fp32 leaves
  Batch batch;
  double label_smoothing = 0.0;  // of the recorded losses and gradients
};

Golden load_golden(const std::string& name);
// Every tensor of NAME.safetensors, of a case that is no model as well.
std::map<std::string, at::Tensor> load_golden_tensors(const std::string& name);
std::vector<Parameter*> all_parameters(Model& model);
// Segments [first, last) of a batch as a batch of their own.
Batch cut_batch(const Batch& batch, std::int64_t first, std::int64_t last);

}  // namespace shardtune::testing
