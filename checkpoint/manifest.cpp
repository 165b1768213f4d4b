#include "checkpoint/manifest.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <set>

#include <fmt/format.h>

#include "core/error.hpp"
#include "core/file.hpp"
#include "core/hash.hpp"
#include "core/json.hpp"

namespace shardtune {
namespace {

constexpr const char* kFormat = "shardtune-checkpoint";
constexpr std::string_view kChecksumKey = ",\"checksum\":\"";
constexpr std::string_view kEnd = "\"}\n";
constexpr std::size_t kTailBytes = 13 + 16 + 3;
static_assert(kChecksumKey.size() == 13 && kEnd.size() == 3);

[[noreturn]] void refuse(const std::filesystem::path& origin, const std::string& what) {
  fail(ErrorKind::data, fmt::format("{}: {}", origin.string(), what));
}

// Of what a damaged or hostile file says no more than fits a line, and nothing that is no text.
std::string dumped(const nlohmann::json& value) {
  return value.dump(-1, ' ', true, nlohmann::json::error_handler_t::replace).substr(0, 60);
}
std::string in_quotes(const std::string& text) { return dumped(text.substr(0, 60)); }

bool is_plain_name(const std::string& name) {
  return !name.empty() && name[0] != '.' && name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
}

// The text in front of the checksum, after the checksum was found to hold.
std::string_view checked_body(std::string_view text, const std::filesystem::path& origin) {
  const std::size_t body_bytes = text.size() < kTailBytes ? 0 : text.size() - kTailBytes;
  const std::string_view tail = text.substr(body_bytes);
  if (body_bytes == 0 || tail.substr(0, 13) != kChecksumKey || tail.substr(29) != kEnd)
    refuse(origin, "the manifest does not end with its checksum; it is truncated or damaged");
  if (tail.substr(13, 16) != to_hex(hash_bytes(text.substr(0, body_bytes))))
    refuse(origin, "the manifest's checksum does not hold; it is damaged");
  return text.substr(0, body_bytes);
}

std::int64_t size_at(const nlohmann::json& list, std::size_t index, const std::string& origin) {
  const nlohmann::json& value = list.at(index);
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max())
    refuse(origin, fmt::format("expected a size, got {}", dumped(value)));
  return value.get<std::int64_t>();
}

const nlohmann::json& list_of(const nlohmann::json& object, const char* key, const std::string& origin) {
  if (!object.is_object() || !object.contains(key) || !object.at(key).is_array())
    refuse(origin, fmt::format("'{}' is missing or no list", key));
  return object.at(key);
}

ManifestFile parse_file(const nlohmann::json& object, std::int64_t version, const std::string& origin) {
  ManifestFile file;
  file.name = json_get<std::string>(object, "name", origin);
  if (!is_plain_name(file.name))
    refuse(origin, fmt::format("the file name {} is not plain: no path, no leading dot", in_quotes(file.name)));
  const std::int64_t size = json_get<std::int64_t>(object, "size", origin);
  if (size < 0) refuse(origin, fmt::format("the size of the file {} is negative: {}", in_quotes(file.name), size));
  file.size = static_cast<std::uint64_t>(size);
  const std::string digest = json_get<std::string>(object, "digest", origin);
  if (digest.size() != 16 || digest.find_first_not_of("0123456789abcdef") != std::string::npos)
    refuse(origin, fmt::format("the digest {} of the file {} is not 16 hexadecimal digits", in_quotes(digest),
                               in_quotes(file.name)));
  file.digest = std::stoull(digest, nullptr, 16);
  file.has_block_table = json_get<bool>(object, "block_table", origin);
  const std::int64_t raw_size = json_get_or<std::int64_t>(object, "raw_size", 0, origin);
  if (raw_size < 0 || (raw_size > 0 && (version < 2 || !file.has_block_table)))
    refuse(origin, fmt::format("the file {} has a 'raw_size' that it cannot have: {}", in_quotes(file.name), raw_size));
  file.raw_size = static_cast<std::uint64_t>(raw_size);
  return file;
}

ManifestTensor parse_tensor(const nlohmann::json& object, const Manifest& manifest, const std::string& origin) {
  ManifestTensor tensor;
  tensor.name = json_get<std::string>(object, "name", origin);
  tensor.field = json_get<std::string>(object, "field", origin);
  tensor.dtype = json_get<std::string>(object, "dtype", origin);
  if (tensor.dtype != "float32" && (tensor.dtype != "bfloat16" || manifest.version < 2))
    refuse(origin, fmt::format("tensor '{}' has the dtype '{}', which format version {} does not know", tensor.name,
                               tensor.dtype.substr(0, 60), manifest.version));
  const nlohmann::json& shape = list_of(object, "shape", origin);
  std::int64_t numel = 1;
  for (std::size_t i = 0; i < shape.size(); ++i) {
    tensor.shape.push_back(size_at(shape, i, origin));
    if (__builtin_mul_overflow(numel, tensor.shape.back(), &numel) || numel > (std::int64_t{1} << 60))
      refuse(origin, fmt::format("the shape of tensor '{}' overflows", tensor.name));
  }
  std::int64_t expected = 0;
  for (const nlohmann::json& item : list_of(object, "slices", origin)) {
    if (!item.is_array() || item.size() != 4)
      refuse(origin, fmt::format("a slice of tensor {} is not a list of four numbers: {}", in_quotes(tensor.name),
                                 dumped(item)));
    ManifestSlice slice{static_cast<std::size_t>(size_at(item, 0, origin)),
                        static_cast<std::uint64_t>(size_at(item, 1, origin)), size_at(item, 2, origin),
                        size_at(item, 3, origin)};
    if (slice.file >= manifest.files.size() || !manifest.files[slice.file].has_block_table)
      refuse(origin, fmt::format("a slice of tensor '{}' names no shard", tensor.name));
    const std::uint64_t file_bytes = manifest.files[slice.file].data_size();
    if (slice.byte_offset > file_bytes ||
        static_cast<std::uint64_t>(slice.numel) > (file_bytes - slice.byte_offset) / tensor.element_bytes())
      refuse(origin, fmt::format("a slice of tensor '{}' lies outside of its file", tensor.name));
    if (slice.offset != expected || slice.numel == 0 || slice.numel > numel - expected)
      refuse(origin, fmt::format("the slices of tensor '{}' do not cover it exactly once", tensor.name));
    expected += slice.numel;
    tensor.slices.push_back(slice);
  }
  if (expected != numel)
    refuse(origin, fmt::format("the slices of tensor '{}' do not cover it exactly once", tensor.name));
  return tensor;
}

auto key_of(const ManifestTensor& tensor) { return std::tie(tensor.name, tensor.field); }

}  // namespace

std::int64_t ManifestTensor::numel() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

const ManifestTensor* Manifest::find(const std::string& name, const std::string& field) const {
  const auto wanted = std::tie(name, field);
  const auto it = std::lower_bound(tensors.begin(), tensors.end(), wanted,
                                   [](const ManifestTensor& tensor, const auto& key) { return key_of(tensor) < key; });
  return it != tensors.end() && key_of(*it) == wanted ? &*it : nullptr;
}

void normalize_tensors(std::vector<ManifestTensor>& tensors) {
  std::sort(tensors.begin(), tensors.end(), [](const auto& a, const auto& b) { return key_of(a) < key_of(b); });
  for (ManifestTensor& tensor : tensors) {
    std::sort(tensor.slices.begin(), tensor.slices.end(),
              [](const auto& a, const auto& b) { return a.offset < b.offset; });
    std::int64_t expected = 0;
    for (const ManifestSlice& slice : tensor.slices) {
      if (slice.offset != expected)
        fail(ErrorKind::internal, fmt::format("the ranks' slices of {} '{}' have a {} at element {}", tensor.name,
                                              tensor.field, slice.offset > expected ? "hole" : "overlap", expected));
      expected += slice.numel;
    }
    if (expected != tensor.numel())
      fail(ErrorKind::internal, fmt::format("the ranks' slices of {} '{}' hold {} of {} elements", tensor.name,
                                            tensor.field, expected, tensor.numel()));
  }
}

std::string serialize_manifest(const Manifest& manifest) {
  // Written piece by piece: a document object for millions of slices would need many times the text's memory.
  const bool has_compressed = std::any_of(manifest.files.begin(), manifest.files.end(),
                                          [](const ManifestFile& file) { return file.raw_size > 0; });
  const bool has_bf16 = std::any_of(manifest.tensors.begin(), manifest.tensors.end(),
                                    [](const ManifestTensor& tensor) { return tensor.dtype == "bfloat16"; });
  std::string text = fmt::format(R"({{"format":"{}","version":{},"step":{},"num_ranks":{},)", kFormat,
                                 has_bf16 || has_compressed ? 2 : 1, manifest.step, manifest.num_ranks);
  text += "\n\"run\":" + manifest.run.dump() + ",\n\"files\":[";
  const char* separator = "\n";
  for (const ManifestFile& file : manifest.files) {
    text += fmt::format(R"({}{{"name":{},"size":{},"digest":"{}","block_table":{}{}}})", separator,
                        nlohmann::json(file.name).dump(), file.size, to_hex(file.digest), file.has_block_table,
                        file.raw_size > 0 ? fmt::format(",\"raw_size\":{}", file.raw_size) : "");
    separator = ",\n";
  }
  text += "],\n\"tensors\":[";
  separator = "\n";
  for (const ManifestTensor& tensor : manifest.tensors) {
    text += fmt::format(R"({}{{"name":{},"field":{},"dtype":"{}","shape":{},"slices":[)", separator,
                        nlohmann::json(tensor.name).dump(), nlohmann::json(tensor.field).dump(), tensor.dtype,
                        nlohmann::json(tensor.shape).dump());
    const char* comma = "";
    for (const ManifestSlice& slice : tensor.slices) {
      text += fmt::format("{}[{},{},{},{}]", comma, slice.file, slice.byte_offset, slice.offset, slice.numel);
      comma = ",";
    }
    text += "]}";
    separator = ",\n";
  }
  text += "]";
  const std::string checksum = to_hex(hash_bytes(text));
  return text.append(kChecksumKey).append(checksum).append(kEnd);
}

Manifest parse_manifest(std::string_view text, const std::filesystem::path& origin_path) {
  const std::string origin = origin_path.string();
  const std::string body(checked_body(text, origin_path));
  const nlohmann::json root = parse_json(body + "}", origin, {.max_bytes = std::size_t{4} << 30});
  if (json_get<std::string>(root, "format", origin) != kFormat) refuse(origin, "this is no shardtune checkpoint");
  const std::int64_t version = json_get<std::int64_t>(root, "version", origin);
  if (version > kCheckpointFormatVersion)
    refuse(
        origin,
        fmt::format("written by a newer shardtune (format version {}, this program reads up to {}); update shardtune",
                    version, kCheckpointFormatVersion));
  if (version < 1) refuse(origin, fmt::format("unknown format version {}", version));
  Manifest manifest;
  manifest.version = version;
  manifest.step = json_get<std::int64_t>(root, "step", origin);
  manifest.num_ranks = static_cast<int>(json_get<std::int64_t>(root, "num_ranks", origin));
  if (!root.contains("run")) refuse(origin, "'run' is missing");
  manifest.run = root["run"];
  std::set<std::string> names;
  for (const nlohmann::json& file : list_of(root, "files", origin)) {
    manifest.files.push_back(parse_file(file, version, origin));
    if (!names.insert(manifest.files.back().name).second)
      refuse(origin, fmt::format("the file {} is listed twice", in_quotes(manifest.files.back().name)));
  }
  for (const nlohmann::json& tensor : list_of(root, "tensors", origin)) {
    manifest.tensors.push_back(parse_tensor(tensor, manifest, origin));
    if (manifest.tensors.size() > 1 && !(key_of(*(manifest.tensors.end() - 2)) < key_of(manifest.tensors.back())))
      refuse(origin,
             fmt::format("the tensors are not in ascending order: {} follows {}",
                         in_quotes(manifest.tensors.back().name), in_quotes((manifest.tensors.end() - 2)->name)));
  }
  return manifest;
}

Manifest read_manifest(const std::filesystem::path& checkpoint_dir) {
  const std::filesystem::path file = checkpoint_dir / "manifest.json";
  return parse_manifest(read_file(file), file);
}

}  // namespace shardtune
