#include "checkpoint/inspect.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_reader.hpp"
#include "core/error.hpp"
#include "core/hash.hpp"

namespace shardtune {
namespace {

// Mean and sum of squared deviations of one piece, merged into those of all before it (Chan, Golub, LeVeque 1979), so
// that a large mean does not swallow the deviations.
class Accumulator {
 public:
  void add(const float* data, std::int64_t size) {
    result_.numel += size;
    std::int64_t count = 0;
    double sum = 0, squares = 0;
    for (std::int64_t i = 0; i < size; ++i) {
      const double x = data[i];
      if (std::isnan(x)) {
        ++result_.num_nan;
      } else if (std::isinf(x)) {
        ++result_.num_inf;
      } else {
        if (count_ + count == 0) result_.min = result_.max = x;
        result_.min = std::min(result_.min, x);
        result_.max = std::max(result_.max, x);
        sum += x;
        squares += x * x;
        ++count;
      }
    }
    if (count == 0) return;
    squares_ += squares;
    const double mean = sum / static_cast<double>(count);
    double deviations = 0;
    for (std::int64_t i = 0; i < size; ++i)
      if (std::isfinite(data[i])) deviations += (data[i] - mean) * (data[i] - mean);
    const double total = static_cast<double>(count_ + count), difference = mean - mean_;
    deviations_ +=
        deviations + difference * difference * static_cast<double>(count_) * static_cast<double>(count) / total;
    mean_ += difference * static_cast<double>(count) / total;
    count_ += count;
  }

  TensorStatistics finish() {
    result_.mean = mean_;
    result_.std = count_ > 0 ? std::sqrt(deviations_ / static_cast<double>(count_)) : 0.0;
    result_.l2 = std::sqrt(squares_);
    return result_;
  }

 private:
  TensorStatistics result_;
  std::int64_t count_ = 0;
  double mean_ = 0, deviations_ = 0, squares_ = 0;
};

TensorStatistics statistics_of(CheckpointReader& reader, const ManifestTensor& tensor) {
  Accumulator accumulator;
  reader.read_in_pieces(tensor, [&](std::int64_t, const at::Tensor& piece) {
    accumulator.add(static_cast<const float*>(piece.data_ptr()), piece.numel());
  });
  return accumulator.finish();
}

// Names that contain the wanted text, or else end like it; at most five.
std::vector<std::string> similar_names(const Manifest& manifest, const std::string& wanted) {
  std::vector<std::string> names;
  const std::string last = wanted.substr(wanted.rfind('.') == std::string::npos ? 0 : wanted.rfind('.') + 1);
  for (const std::string& text : {wanted, last})
    for (const ManifestTensor& tensor : manifest.tensors)
      if (names.size() < 5 && tensor.name.find(text) != std::string::npos &&
          std::find(names.begin(), names.end(), tensor.name) == names.end())
        names.push_back(tensor.name);
  return names;
}

nlohmann::json describe_slices(const Manifest& manifest, const ManifestTensor& tensor) {
  nlohmann::json slices = nlohmann::json::array();
  for (const ManifestSlice& slice : tensor.slices)
    slices.push_back({{"file", manifest.files[slice.file].name}, {"offset", slice.offset}, {"numel", slice.numel}});
  return slices;
}

}  // namespace

nlohmann::json describe_checkpoint(const std::filesystem::path& checkpoint_dir) {
  const Manifest manifest = read_manifest(checkpoint_dir);
  nlohmann::json files = nlohmann::json::array(), tensors = nlohmann::json::array();
  std::uint64_t bytes = 0;
  for (const ManifestFile& file : manifest.files) {
    files.push_back({{"name", file.name},
                     {"bytes", file.size},
                     {"digest", to_hex(file.digest)},
                     {"block_table", file.has_block_table}});
    bytes += file.size;
  }
  std::int64_t parameters = 0;
  for (const ManifestTensor& tensor : manifest.tensors) {
    // Tensors are sorted by name: the fields of one name are neighbours.
    if (tensors.empty() || tensors.back()["name"] != tensor.name)
      tensors.push_back({{"name", tensor.name},
                         {"shape", tensor.shape},
                         {"numel", tensor.numel()},
                         {"fields", nlohmann::json::object()}});
    tensors.back()["fields"][tensor.field] = {{"dtype", tensor.dtype}, {"slices", describe_slices(manifest, tensor)}};
    if (tensor.field == "value") parameters += tensor.numel();
  }
  return {{"directory", checkpoint_dir.string()},
          {"format_version", manifest.version},
          {"step", manifest.step},
          {"num_ranks", manifest.num_ranks},
          {"parameters", parameters},
          {"bytes", bytes},
          {"files", std::move(files)},
          {"tensors", std::move(tensors)},
          {"run", manifest.run}};
}

nlohmann::json TensorStatistics::to_json() const {
  nlohmann::json json = {{"numel", numel}, {"num_nan", num_nan}, {"num_inf", num_inf}};
  const bool has_any = num_finite() > 0;
  const auto put = [&](const char* key, double value) {
    json[key] = has_any ? nlohmann::json(value) : nlohmann::json();
  };
  put("min", min), put("max", max), put("mean", mean), put("std", std), put("l2", l2);
  return json;
}

TensorStatistics tensor_statistics(const std::filesystem::path& checkpoint_dir, const std::string& name,
                                   const std::string& field) {
  CheckpointReader reader(checkpoint_dir);
  return statistics_of(reader, reader.tensor(name, field));
}

nlohmann::json describe_tensor(const std::filesystem::path& checkpoint_dir, const std::string& name) {
  CheckpointReader reader(checkpoint_dir);
  nlohmann::json fields = nlohmann::json::object(), shape;
  for (const ManifestTensor& tensor : reader.manifest().tensors) {
    if (tensor.name != name) continue;
    shape = tensor.shape;
    fields[tensor.field] = statistics_of(reader, tensor).to_json();
  }
  if (fields.empty()) {
    const std::vector<std::string> similar = similar_names(reader.manifest(), name);
    fail(ErrorKind::data, fmt::format("{} holds no tensor '{}'{}{}; `checkpoint inspect` without --tensor lists all",
                                      checkpoint_dir.string(), name, similar.empty() ? "" : "; did you mean ",
                                      fmt::join(similar, ", ")));
  }
  return {{"name", name}, {"shape", std::move(shape)}, {"fields", std::move(fields)}};
}

}  // namespace shardtune
