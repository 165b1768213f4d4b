#include <algorithm>
#include <cmath>
#include <cstring>

#include <ATen/ops/empty_like.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_reader.hpp"
#include "checkpoint/tools.hpp"

namespace shardtune {
namespace {

// Null when all bits are equal.
nlohmann::json compare(CheckpointReader& a, CheckpointReader& b, const ManifestTensor& in_a,
                       const ManifestTensor& in_b) {
  std::int64_t num_different = 0, first_different = -1;
  double largest = 0;
  a.read_in_pieces(in_a, [&](std::int64_t begin, const at::Tensor& piece_a) {
    const at::Tensor piece_b = at::empty_like(piece_a);
    b.read({{&in_b, begin, piece_b}});
    const auto* x = static_cast<const float*>(piece_a.data_ptr());
    const auto* y = static_cast<const float*>(piece_b.data_ptr());
    const std::int64_t size = piece_a.numel();
    if (std::memcmp(x, y, static_cast<std::size_t>(size) * sizeof(float)) == 0) return;
    for (std::int64_t i = 0; i < size; ++i) {
      if (std::memcmp(x + i, y + i, sizeof(float)) == 0) continue;
      if (num_different++ == 0) first_different = begin + i;
      largest = std::fmax(largest, std::fabs(static_cast<double>(x[i]) - static_cast<double>(y[i])));
    }
  });
  if (num_different == 0) return nullptr;
  return {{"name", in_a.name},
          {"field", in_a.field},
          {"num_different", num_different},
          {"first_different", first_different},
          {"max_abs_difference", largest}};
}

}  // namespace

nlohmann::json diff_checkpoints(const std::filesystem::path& path_a, const std::filesystem::path& path_b) {
  CheckpointReader a(path_a), b(path_b);
  nlohmann::json only_in_a = nlohmann::json::array(), only_in_b = only_in_a, tensors = only_in_a, run = only_in_a;
  const auto label = [](const ManifestTensor& tensor) { return tensor.name + " " + tensor.field; };
  for (const ManifestTensor& tensor : b.manifest().tensors)
    if (a.manifest().find(tensor.name, tensor.field) == nullptr) only_in_b.push_back(label(tensor));
  for (const ManifestTensor& tensor : a.manifest().tensors) {
    const ManifestTensor* other = b.manifest().find(tensor.name, tensor.field);
    if (other == nullptr) {
      only_in_a.push_back(label(tensor));
    } else if (other->shape != tensor.shape) {
      tensors.push_back(
          {{"name", tensor.name}, {"field", tensor.field}, {"shape_a", tensor.shape}, {"shape_b", other->shape}});
    } else if (nlohmann::json difference = compare(a, b, tensor, *other); !difference.is_null()) {
      tensors.push_back(std::move(difference));
    }
  }
  for (const nlohmann::json& change : nlohmann::json::diff(a.manifest().run, b.manifest().run))
    if (std::find(run.begin(), run.end(), change["path"]) == run.end()) run.push_back(change["path"]);
  return {{"equal", only_in_a.empty() && only_in_b.empty() && tensors.empty() && run.empty()},
          {"only_in_a", only_in_a},
          {"only_in_b", only_in_b},
          {"tensors", tensors},
          {"run", run}};
}

}  // namespace shardtune
