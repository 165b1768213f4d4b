#pragma once
// Writes a whole checkpoint from one process in constant memory: for tools that convert, not for training.
#include <cstdint>
#include <filesystem>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <nlohmann/json.hpp>

#include "checkpoint/state_view.hpp"

namespace shardtune {

struct OfflineTensor {
  std::string name, field;
  std::vector<std::int64_t> shape;
  std::string dtype = "float32";  // or "bfloat16"
};

struct OfflineCheckpoint {
  std::int64_t step = 0;
  int num_shards = 1;  // every tensor is cut evenly over them
  nlohmann::json run = nlohmann::json::object();
  std::vector<SideFile> side_files = {};
  std::vector<OfflineTensor> tensors = {};
};

// Fills `into` (contiguous, of the tensor's dtype) with the elements of tensors[tensor] from `offset` on.
using ReadElements = std::function<void(std::size_t tensor, std::int64_t offset, const at::Tensor& into)>;

// Writes OUTPUT_DIR/checkpoint-<step>, durable and committed by the protocol of every save, and returns its path.
// `latest` names it unless a newer one is there. Holds the directory's lock as `purpose` ("checkpoint import").
// Error{config} when there is one already or the directory is in use, Error{io}, and what `read` throws; no checkpoint
// is left behind then.
std::filesystem::path write_checkpoint(const std::filesystem::path& output_dir, const std::string& purpose,
                                       const OfflineCheckpoint& what, const ReadElements& read);

}  // namespace shardtune
