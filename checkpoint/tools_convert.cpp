#include <algorithm>
#include <cctype>
#include <charconv>
#include <iterator>
#include <map>
#include <system_error>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_reader.hpp"
#include "checkpoint/offline_writer.hpp"
#include "checkpoint/safetensors.hpp"
#include "checkpoint/tools.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/model_files.hpp"

namespace shardtune {
namespace fs = std::filesystem;
namespace {

constexpr const char* kIndexFile = "model.safetensors.index.json";

// Of the files of a model directory, those that belong to the model and are no weights.
bool is_model_companion(const std::string& name) {
  return name == "config.json" || name == "generation_config.json" ||
         std::find(std::begin(kTokenizerFiles), std::end(kTokenizerFiles), name) != std::end(kTokenizerFiles);
}

// What PyTorch pickles: torch.save of the optimizer, the schedule, the random generators, the arguments.
bool is_pickle(const fs::path& file) {
  for (const char* extension : {".pt", ".pth", ".bin", ".pkl", ".ckpt"})
    if (file.extension() == extension) return true;
  return false;
}

// The stored type of the weights in config.json, where readers look for it.
std::string with_dtype(const std::string& config, const std::string& dtype) {
  nlohmann::ordered_json json = nlohmann::ordered_json::parse(config, nullptr, false);
  if (!json.is_object()) return config;
  const bool has_old_key = json.contains("torch_dtype");
  json[has_old_key ? "torch_dtype" : "dtype"] = dtype;
  return json.dump(2) + "\n";
}

// Consecutive tensors per file, as many as fit.
std::vector<std::vector<const ManifestTensor*>> split_into_files(const Manifest& manifest,
                                                                 const ExportOptions& options) {
  const std::uint64_t element_bytes = options.dtype == "bfloat16" ? 2 : 4;
  std::vector<std::vector<const ManifestTensor*>> files;
  std::uint64_t filled = 0;
  for (const ManifestTensor& tensor : manifest.tensors) {
    if (tensor.field != "value") continue;
    const std::uint64_t bytes = static_cast<std::uint64_t>(tensor.numel()) * element_bytes;
    if (files.empty() || (filled > 0 && filled + bytes > options.max_shard_bytes)) files.emplace_back(), filled = 0;
    files.back().push_back(&tensor);
    filled += bytes;
  }
  return files;
}

void write_tensors(CheckpointReader& reader, const fs::path& file, const std::vector<const ManifestTensor*>& tensors,
                   const std::string& dtype) {
  std::vector<SafetensorsWriter::Item> items;
  for (const ManifestTensor* tensor : tensors)
    items.push_back({tensor->name, dtype == "bfloat16" ? "BF16" : "F32", tensor->shape});
  SafetensorsWriter writer(file, std::move(items));
  for (const ManifestTensor* tensor : tensors)
    reader.read_in_pieces(*tensor, [&](std::int64_t, const at::Tensor& piece) { writer.write(piece); });
  writer.commit();
}

void write_index(const fs::path& file, const std::vector<std::vector<const ManifestTensor*>>& files,
                 const std::vector<std::string>& names, std::uint64_t bytes) {
  nlohmann::ordered_json weight_map = nlohmann::ordered_json::object();
  for (std::size_t i = 0; i < files.size(); ++i)
    for (const ManifestTensor* tensor : files[i]) weight_map[tensor->name] = names[i];
  write_file_durably(
      file, nlohmann::ordered_json{{"metadata", {{"total_size", bytes}}}, {"weight_map", weight_map}}.dump(2) + "\n");
}

// Side files of a checkpoint after their digests were found to hold.
std::vector<SideFile> read_side_files(const fs::path& checkpoint_dir, const Manifest& manifest) {
  std::vector<SideFile> files;
  for (const ManifestFile& file : manifest.files) {
    if (file.has_block_table) continue;
    const BlockTable table = hash_file(checkpoint_dir / file.name);
    if (table.digest() != file.digest || table.file_bytes != file.size)
      fail(ErrorKind::data,
           fmt::format("{} is damaged; use another checkpoint", (checkpoint_dir / file.name).string()));
    files.push_back({file.name, read_file(checkpoint_dir / file.name)});
  }
  return files;
}

}  // namespace

std::uint64_t parse_byte_size(const std::string& text, const char* option) {
  static const std::map<std::string, std::uint64_t> kUnits = {{"", 1},
                                                              {"B", 1},
                                                              {"KB", 1000},
                                                              {"MB", 1000000},
                                                              {"GB", 1000000000},
                                                              {"TB", 1000000000000},
                                                              {"KIB", 1ULL << 10},
                                                              {"MIB", 1ULL << 20},
                                                              {"GIB", 1ULL << 30},
                                                              {"TIB", 1ULL << 40}};
  std::uint64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  std::string unit(end, text.data() + text.size());
  std::transform(unit.begin(), unit.end(), unit.begin(),
                 [](unsigned char c) { return static_cast<char>(std::toupper(c)); });
  const auto it = kUnits.find(unit);
  std::uint64_t bytes = 0;
  if (error != std::errc() || it == kUnits.end() || __builtin_mul_overflow(number, it->second, &bytes) || bytes == 0)
    fail(ErrorKind::config,
         fmt::format("--{} = {}: a size such as 5GB, 200MiB or a number of bytes is needed", option, text));
  return bytes;
}

nlohmann::json export_safetensors(const fs::path& checkpoint_dir, const fs::path& model_dir,
                                  const ExportOptions& wanted) {
  ExportOptions options = wanted;
  if (options.dtype == "bf16") options.dtype = "bfloat16";
  if (options.dtype == "fp32") options.dtype = "float32";
  if (options.dtype != "float32" && options.dtype != "bfloat16")
    fail(ErrorKind::config, fmt::format("--dtype = {}: use float32 or bfloat16", options.dtype));
  CheckpointReader reader(checkpoint_dir);
  for (const char* name : {"model.safetensors", kIndexFile})
    if (fs::exists(model_dir / name))
      fail(ErrorKind::config,
           fmt::format("{} holds a model already ({}); choose another directory", model_dir.string(), name));
  make_directories_durably(model_dir);
  const auto files = split_into_files(reader.manifest(), options);
  std::vector<std::string> names;
  for (std::size_t i = 0; i < files.size(); ++i)
    names.push_back(files.size() == 1 ? "model.safetensors"
                                      : fmt::format("model-{:05d}-of-{:05d}.safetensors", i + 1, files.size()));
  std::uint64_t bytes = 0;
  std::size_t num_tensors = 0;
  for (const auto& tensors : files)
    for (const ManifestTensor* tensor : tensors) {
      bytes += static_cast<std::uint64_t>(tensor->numel()) * (options.dtype == "bfloat16" ? 2 : 4);
      ++num_tensors;
    }
  try {
    for (std::size_t i = 0; i < files.size(); ++i) write_tensors(reader, model_dir / names[i], files[i], options.dtype);
    for (const SideFile& side : read_side_files(checkpoint_dir, reader.manifest()))
      if (is_model_companion(side.name))
        write_file_durably(model_dir / side.name,
                           side.name == "config.json" ? with_dtype(side.content, options.dtype) : side.content);
    // The index comes last: without it the numbered parts are no model.
    if (files.size() > 1) write_index(model_dir / kIndexFile, files, names, bytes);
  } catch (...) {
    std::error_code ignored;
    for (const std::string& name : names) fs::remove(model_dir / name, ignored);
    throw;
  }
  return {{"directory", model_dir.string()}, {"files", names}, {"tensors", num_tensors}, {"bytes", bytes}};
}

nlohmann::json import_model(const fs::path& model_dir, const fs::path& output_dir) {
  OfflineCheckpoint what;
  std::vector<SafetensorsEntry> entries;
  nlohmann::json skipped = nlohmann::json::array();
  for (auto& [name, entry] : read_model_headers(model_dir)) {
    if (entry.dtype != "F32" && entry.dtype != "BF16" && entry.dtype != "F16" && entry.dtype != "F64") {
      skipped.push_back(fmt::format("{} ({})", name, entry.dtype));
      continue;
    }
    what.tensors.push_back({name, "value", entry.shape});
    entries.push_back(std::move(entry));
  }
  std::vector<std::string> pickles;
  for (const auto& file : fs::directory_iterator(model_dir)) {
    const std::string name = file.path().filename().string();
    if (file.is_regular_file() && is_model_companion(name)) what.side_files.push_back({name, read_file(file.path())});
    if (is_pickle(file.path())) pickles.push_back(name);
  }
  std::sort(pickles.begin(), pickles.end());
  std::sort(what.side_files.begin(), what.side_files.end(),
            [](const auto& a, const auto& b) { return a.name < b.name; });
  what.run = {
      {"step", 0}, {"run_id", "imported"}, {"imported_from", fs::absolute(model_dir).lexically_normal().string()}};
  const fs::path written = write_checkpoint(output_dir, "checkpoint import", what,
                                            [&](std::size_t tensor, std::int64_t offset, const at::Tensor& into) {
                                              read_safetensors_slice(entries[tensor], offset, into);
                                            });
  nlohmann::json report{{"checkpoint", written.string()},
                        {"tensors", entries.size()},
                        {"skipped", skipped},
                        {"refused_pickles", pickles}};
  if (!pickles.empty())
    report["hint"] =
        "pickles can run any program when read, so they are not: the weights were taken, optimizer and schedule begin "
        "anew. "
        "Train from this checkpoint with --model_name_or_path and give learning rate and steps as options";
  return report;
}

fs::path reshard_checkpoint(const fs::path& checkpoint_dir, const fs::path& output_dir, int num_shards) {
  if (num_shards < 1 || num_shards > 99999)
    fail(ErrorKind::config, fmt::format("--shards = {}: a number from 1 to 99999 is needed", num_shards));
  CheckpointReader reader(checkpoint_dir);
  const Manifest& manifest = reader.manifest();
  OfflineCheckpoint what{.step = manifest.step,
                         .num_shards = num_shards,
                         .run = manifest.run,
                         .side_files = read_side_files(checkpoint_dir, manifest)};
  for (const ManifestTensor& tensor : manifest.tensors)
    what.tensors.push_back({tensor.name, tensor.field, tensor.shape, tensor.dtype});
  return write_checkpoint(output_dir, "checkpoint reshard", what,
                          [&](std::size_t tensor, std::int64_t offset, const at::Tensor& into) {
                            reader.read({{&manifest.tensors[tensor], offset, into}});
                          });
}

}  // namespace shardtune
