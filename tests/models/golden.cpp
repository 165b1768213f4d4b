#include "tests/models/golden.hpp"

#include <cstdlib>
#include <filesystem>
#include <stdexcept>

#include <ATen/ATen.h>

#include "checkpoint/safetensors.hpp"
#include "core/file.hpp"
#include "core/json.hpp"

namespace shardtune::testing {
namespace {

std::filesystem::path golden_folder() {
  const char* source = std::getenv("SHARDTUNE_SOURCE_DIR");
  if (source == nullptr) throw std::runtime_error("SHARDTUNE_SOURCE_DIR is not set; run this test through ctest");
  return std::filesystem::path(source) / "tests/golden";
}

at::Tensor read_tensor(const SafetensorsEntry& entry) {
  if (entry.dtype == "I64") {
    at::Tensor values = at::empty(entry.shape, at::kLong);
    const UniqueFd fd = open_for_reading(entry.file);
    pread_exactly(fd.get(), values.mutable_data_ptr(), entry.end - entry.begin, entry.begin, entry.file);
    return values;
  }
  at::Tensor values = at::empty(entry.shape, at::kFloat);
  read_safetensors_slice(entry, 0, values.view(-1));
  return values;
}

Batch make_batch(const std::map<std::string, at::Tensor>& tensors) {
  Batch batch;
  batch.ids = tensors.at("ids");
  batch.labels = tensors.at("labels");
  if (tensors.contains("token_types")) batch.token_types = tensors.at("token_types");
  batch.segment_offsets = {0};
  std::vector<at::Tensor> positions;
  const at::Tensor& lengths = tensors.at("lengths");
  for (std::int64_t s = 0; s < lengths.numel(); ++s) {
    const auto length = lengths[s].item<std::int64_t>();
    batch.segment_offsets.push_back(batch.segment_offsets.back() + length);
    batch.example_index.push_back(s);
    positions.push_back(at::arange(length, at::kLong));
  }
  batch.positions = at::cat(positions);
  return batch;
}

}  // namespace

std::vector<Parameter*> all_parameters(Model& model) {
  std::vector<Parameter*> all;
  for (Unit* unit : model.units()) all.insert(all.end(), unit->parameters.begin(), unit->parameters.end());
  return all;
}

std::map<std::string, at::Tensor> load_golden_tensors(const std::string& name) {
  std::map<std::string, at::Tensor> tensors;
  for (const auto& [key, entry] : read_safetensors_header(golden_folder() / (name + ".safetensors")))
    tensors[key] = read_tensor(entry);
  return tensors;
}

Golden load_golden(const std::string& name) {
  Golden golden;
  golden.tensors = load_golden_tensors(name);
  golden.config = read_json_file(golden_folder() / (name + ".json"));
  ModelRequest request;
  request.config = &golden.config;
  request.origin = name + ".json";
  request.task = golden.config.at("model_type") == "bert" ? Task::text_classification : Task::causal_lm;
  golden.model = make_model(request);
  for (Parameter* parameter : all_parameters(*golden.model))
    parameter->value = golden.tensors.at("weights." + parameter->name).clone().requires_grad_(true);
  golden.batch = make_batch(golden.tensors);
  if (const auto it = golden.tensors.find("label_smoothing"); it != golden.tensors.end())
    golden.label_smoothing = it->second.item<double>();
  return golden;
}

Batch cut_batch(const Batch& batch, std::int64_t first, std::int64_t last) {
  const std::int64_t begin = batch.segment_offsets.at(static_cast<std::size_t>(first));
  const std::int64_t end = batch.segment_offsets.at(static_cast<std::size_t>(last));
  const bool is_per_token = batch.labels.numel() == batch.num_tokens();
  Batch part;
  part.ids = batch.ids.slice(0, begin, end);
  part.positions = batch.positions.slice(0, begin, end);
  if (batch.token_types.defined()) part.token_types = batch.token_types.slice(0, begin, end);
  part.labels = is_per_token ? batch.labels.slice(0, begin, end) : batch.labels.slice(0, first, last);
  for (std::int64_t s = first; s <= last; ++s)
    part.segment_offsets.push_back(batch.segment_offsets[static_cast<std::size_t>(s)] - begin);
  part.example_index.assign(batch.example_index.begin() + first, batch.example_index.begin() + last);
  return part;
}

}  // namespace shardtune::testing
