#pragma once
// What is saved and loaded, free of any notion of how a run is parallelised: named flat slices of global tensors.
#include <cstdint>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>
#include <nlohmann/json.hpp>

namespace shardtune {

// A contiguous piece of one global tensor, held by this rank. Over all ranks the slices of one (name, field) cover the
// flat global tensor exactly once (empty slices are fine).
struct StateSlice {
  std::string name;   // Hugging Face parameter name
  std::string field;  // "value", "exp_avg", "exp_avg_sq"
  std::vector<std::int64_t> global_shape;
  std::int64_t offset = 0;  // first element of the slice in the flat global tensor
  at::Tensor data;          // 1-d contiguous, fp32 or bf16; saved from or loaded into (converted where it must be)
};

// "float32" or "bfloat16", the names of the format, and back. Error{internal} for other types and names.
const char* dtype_name(c10::ScalarType dtype);
c10::ScalarType dtype_of(const std::string& name);

struct SideFile {
  std::string name;  // plain file name inside the checkpoint: "config.json", "tokenizer.json", ...
  std::string content;
};

struct StateView {
  std::vector<StateSlice> slices;
  // Small state equal on all ranks: step, data cursor, schedule, best metric, run identity. Stored in /run and
  // manifest.
  nlohmann::json run;
  std::vector<SideFile> side_files;  // written by rank 0
};

}  // namespace shardtune
