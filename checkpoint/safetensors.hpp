#pragma once
// The safetensors format (https://github.com/huggingface/safetensors, README "Format"): reading with every check the
// format demands, writing as Hugging Face does. Hostile headers are Error{data} naming the file and the field.
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace shardtune {

struct SafetensorsEntry {
  std::filesystem::path file;
  std::string dtype;  // "F32", "BF16", "F16", "F64", "I64", ...
  std::vector<std::int64_t> shape;
  std::uint64_t begin = 0, end = 0;  // absolute byte range in the file
  std::int64_t numel() const;
};

// Header of one file, or of all shards named by model.safetensors.index.json (names without path separators only).
// Keyed by tensor name.
std::map<std::string, SafetensorsEntry> read_safetensors_header(const std::filesystem::path& file);
// `model_dir` holds model.safetensors or the index; Error{data} says which were looked for (and how to convert a .bin).
std::map<std::string, SafetensorsEntry> read_model_headers(const std::filesystem::path& model_dir);

// Elements [offset, offset + into.numel()) of a floating-point tensor, converted to fp32. Large reads, no mmap
// (mapped files are pathologically slow on Lustre and NFS). Thread-safe.
void read_safetensors_slice(const SafetensorsEntry& entry, std::int64_t offset, at::Tensor into);

// One tensor at a time, constant memory: construct with all names, dtypes and shapes, then write in that order.
class SafetensorsWriter {
 public:
  struct Item {
    std::string name;
    std::string dtype;  // "F32" or "BF16"
    std::vector<std::int64_t> shape;
  };
  // Writes FILE.tmp; commit() syncs and renames. Items keep the given order. metadata: {"format":"pt"}.
  SafetensorsWriter(std::filesystem::path file, std::vector<Item> items);
  ~SafetensorsWriter();
  void write(
      const at::Tensor& flat);  // the next bytes of the data section, converted from fp32; may be pieces of a tensor
  void commit();

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace shardtune
