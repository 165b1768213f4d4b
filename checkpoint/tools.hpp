#pragma once
// What `shardtune checkpoint ...` does to checkpoints. Offline: one process, no communicator, constant memory
// (manifests, side files and some MiB of data). Every byte that is read is verified. Error{data} for damage,
// Error{config} for a target that exists or a directory in use, Error{io} for failing writes; no part of a
// model or checkpoint is left behind then.
#include <cstdint>
#include <filesystem>
#include <string>
#include <vector>

#include <nlohmann/json_fwd.hpp>

namespace shardtune {

// Bit for bit: {"equal", "only_in_a": [...], "only_in_b": [...], "tensors": [{"name", "field", "shape_a", "shape_b"} or
// {"name", "field", "num_different", "first_different", "max_abs_difference"}], "run": [JSON pointers that differ]}.
// Entries "name field" where something differs only; how the tensors are cut does not matter.
nlohmann::json diff_checkpoints(const std::filesystem::path& a, const std::filesystem::path& b);

struct ExportOptions {
  std::string dtype = "float32";                   // or "bfloat16", "bf16": rounded to nearest even
  std::uint64_t max_shard_bytes = 50'000'000'000;  // a larger tensor gets a file of its own
};
// A Hugging Face model directory: model.safetensors (or numbered parts and their index), config.json, tokenizer files.
// {"directory", "files": [...], "tensors", "bytes"}.
nlohmann::json export_safetensors(const std::filesystem::path& checkpoint_dir, const std::filesystem::path& model_dir,
                                  const ExportOptions& options);
// "5GB" (10^9), "200MiB" (2^20), "4096": as Hugging Face reads sizes. Error{config} naming `option`.
std::uint64_t parse_byte_size(const std::string& text, const char* option);

// The weights of a Hugging Face directory (also one the HF Trainer saved: its pickles are refused and named) as
// OUTPUT_DIR/checkpoint-0, names as in the file, converted to fp32. {"checkpoint", "tensors", "skipped": [no floats],
// "refused_pickles": [...], "hint": what to do about them, where there are any}.
nlohmann::json import_model(const std::filesystem::path& model_dir, const std::filesystem::path& output_dir);

// The same checkpoint in OUTPUT_DIR, cut into `num_shards` files. Returns its path.
std::filesystem::path reshard_checkpoint(const std::filesystem::path& checkpoint_dir,
                                         const std::filesystem::path& output_dir, int num_shards);

// Deletes the oldest until `keep` are left; the newest that verifies and the best one stay. Returns what was deleted.
std::vector<std::string> prune_output_dir(const std::filesystem::path& output_dir, int keep);

// Removes what killed saves left behind and rebuilds `latest`; a committed checkpoint is never touched.
// {"removed": [...], "latest": name or null, "damaged": [{"checkpoint", "problems"}]}.
nlohmann::json repair_output_dir(const std::filesystem::path& output_dir);

}  // namespace shardtune
