#pragma once
// What a committed checkpoint holds, as JSON. Offline: no communicator, no HDF5, constant memory (the manifest and 1
// MiB of data). Error{data} for a checkpoint that is damaged, missing or not committed.
#include <cstdint>
#include <filesystem>
#include <string>

#include <nlohmann/json_fwd.hpp>

namespace shardtune {

// {"directory", "format_version", "step", "num_ranks", "parameters", "bytes",
//  "files": [{"name", "bytes", "digest", "block_table"}],
//  "tensors": [{"name", "shape", "numel", "fields": {"<field>": {"dtype", "slices": [{"file", "offset", "numel"}]}}}],
//  "run": {...}}. Reads the manifest only; `parameters` counts elements of the field "value".
nlohmann::json describe_checkpoint(const std::filesystem::path& checkpoint_dir);

// Of the finite elements; all sums in fp64.
struct TensorStatistics {
  std::int64_t numel = 0, num_nan = 0, num_inf = 0;
  double min = 0, max = 0, mean = 0, std = 0, l2 = 0;  // of no meaning when there is no finite element

  std::int64_t num_finite() const noexcept { return numel - num_nan - num_inf; }
  nlohmann::json to_json() const;  // the figures are null when there is no finite element
};

// std is that of the population (divided by n). Every byte is verified on the way.
TensorStatistics tensor_statistics(const std::filesystem::path& checkpoint_dir, const std::string& name,
                                   const std::string& field);

// What `checkpoint inspect --tensor NAME` prints: {"name", "shape", "fields": {"<field>": statistics}} over all fields
// of the tensor. Error{data} for an unknown name lists the nearest ones.
nlohmann::json describe_tensor(const std::filesystem::path& checkpoint_dir, const std::string& name);

}  // namespace shardtune
