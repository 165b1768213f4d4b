#include <algorithm>
#include <cstring>
#include <limits>
#include <set>
#include <system_error>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/safetensors.hpp"
#include "core/error.hpp"
#include "core/file.hpp"
#include "core/json.hpp"

namespace shardtune {
namespace {

constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

// Names out of a hostile file must not write control characters to the terminal, nor cut the message at a NUL.
std::string printable(std::string text) {
  for (char& c : text)
    if (static_cast<unsigned char>(c) < 0x20 || c == 0x7f) c = '?';
  return text;
}

[[noreturn]] void refuse(const std::filesystem::path& file, const std::string& what) {
  fail(ErrorKind::data,
       fmt::format("{}: {}; the file is damaged or no safetensors file", file.string(), printable(what)));
}

// Bits of one element; a dtype that is not in the format is refused, never skipped.
std::uint64_t dtype_bits(const std::string& dtype, const std::filesystem::path& file, const std::string& name) {
  static const std::map<std::string, std::uint64_t> kBits = {
      {"BOOL", 8},        {"U8", 8},      {"I8", 8},      {"I16", 16},    {"U16", 16},    {"I32", 32},
      {"U32", 32},        {"I64", 64},    {"U64", 64},    {"F16", 16},    {"BF16", 16},   {"F32", 32},
      {"F64", 64},        {"C64", 64},    {"F8_E4M3", 8}, {"F8_E5M2", 8}, {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8},
      {"F8_E5M2FNUZ", 8}, {"F6_E2M3", 6}, {"F6_E3M2", 6}, {"F4", 4}};
  const auto it = kBits.find(dtype);
  if (it == kBits.end()) refuse(file, fmt::format("tensor '{}' has the unknown dtype '{}'", name, dtype));
  return it->second;
}

std::uint64_t unsigned_field(const nlohmann::json& value, const std::filesystem::path& file, const std::string& field) {
  // Only an unsigned integer literal: 4.0, -1 and numbers beyond int64 are refused.
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > std::numeric_limits<std::int64_t>::max())
    refuse(file, fmt::format("{} must be a non-negative integer, got {}", field, value.dump().substr(0, 60)));
  return value.get<std::uint64_t>();
}

std::uint64_t byte_size(const SafetensorsEntry& entry, const std::string& name) {
  const std::uint64_t bits = dtype_bits(entry.dtype, entry.file, name);
  std::int64_t numel = 1;
  for (const std::int64_t extent : entry.shape)
    if (__builtin_mul_overflow(numel, extent, &numel))
      refuse(entry.file, fmt::format("the shape of tensor '{}' overflows", name));
  std::uint64_t total = 0;
  if (__builtin_mul_overflow(static_cast<std::uint64_t>(numel), bits, &total))
    refuse(entry.file, fmt::format("the size of tensor '{}' overflows", name));
  if (total % 8 != 0) refuse(entry.file, fmt::format("tensor '{}' does not end at a whole byte", name));
  return total / 8;
}

SafetensorsEntry parse_entry(const std::filesystem::path& file, const std::string& name, const nlohmann::json& info) {
  if (!info.is_object()) refuse(file, fmt::format("the entry of tensor '{}' is no object", name));
  for (const char* key : {"dtype", "shape", "data_offsets"})
    if (!info.contains(key)) refuse(file, fmt::format("tensor '{}' lacks '{}'", name, key));
  SafetensorsEntry entry;
  entry.file = file;
  if (!info["dtype"].is_string()) refuse(file, fmt::format("the dtype of tensor '{}' is no string", name));
  entry.dtype = info["dtype"].get<std::string>();
  if (!info["shape"].is_array()) refuse(file, fmt::format("the shape of tensor '{}' is no list", name));
  for (const auto& extent : info["shape"])
    entry.shape.push_back(
        static_cast<std::int64_t>(unsigned_field(extent, file, fmt::format("the shape of tensor '{}'", name))));
  const auto& offsets = info["data_offsets"];
  if (!offsets.is_array() || offsets.size() != 2)
    refuse(file, fmt::format("data_offsets of tensor '{}' are no pair", name));
  entry.begin = unsigned_field(offsets[0], file, fmt::format("data_offsets of tensor '{}'", name));
  entry.end = unsigned_field(offsets[1], file, fmt::format("data_offsets of tensor '{}'", name));
  if (entry.end < entry.begin || entry.end - entry.begin != byte_size(entry, name))
    refuse(file, fmt::format("data_offsets [{}, {}] of tensor '{}' do not fit its dtype and shape", entry.begin,
                             entry.end, name));
  return entry;
}

void check_metadata(const std::filesystem::path& file, const nlohmann::json& metadata) {
  if (metadata.is_null()) return;  // as the reference implementation has it
  if (!metadata.is_object()) refuse(file, "__metadata__ is no object");
  for (const auto& [key, value] : metadata.items())
    if (!value.is_string()) refuse(file, fmt::format("__metadata__ '{}' is no string", key));
}

// The tensors cover the data section exactly: no hole, no overlap, nothing behind the last one. Offsets become
// absolute.
void place_entries(const std::filesystem::path& file, std::map<std::string, SafetensorsEntry>& entries,
                   std::uint64_t data_begin, std::uint64_t file_bytes) {
  std::vector<std::pair<SafetensorsEntry*, const std::string*>> order;
  for (auto& [name, entry] : entries) order.emplace_back(&entry, &name);
  std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
    return std::pair(a.first->begin, a.first->end) < std::pair(b.first->begin, b.first->end);
  });
  std::uint64_t expected = 0;
  for (auto& [entry, name] : order) {
    if (entry->begin != expected)
      refuse(file, fmt::format("tensor '{}' begins at data byte {} where {} is due ({})", *name, entry->begin, expected,
                               entry->begin < expected ? "it overlaps another tensor" : "there is a hole before it"));
    expected = entry->end;
  }
  if (expected != file_bytes - data_begin)
    refuse(file,
           fmt::format("the header describes {} bytes of data, the file holds {}", expected, file_bytes - data_begin));
  for (auto& [entry, name] : order) {
    entry->begin += data_begin;
    entry->end += data_begin;
  }
}

// A name out of an index file may be nothing but a file of the same folder.
void check_plain_name(const std::filesystem::path& index, const std::string& name) {
  const bool is_plain = !name.empty() && name != "." && name != ".." &&
                        name.find_first_of(std::string_view("/\\\0", 3)) == std::string::npos;
  if (!is_plain)
    fail(ErrorKind::data,
         fmt::format("{}: weight_map names the file '{}'; only plain file names of the same directory are allowed",
                     index.string(), printable(name)));
}

// A link may lead to another file of the folder or, as in the Hugging Face cache, to ../../blobs/<hash>.
void check_link(const std::filesystem::path& file) {
  std::error_code error;
  if (!std::filesystem::is_symlink(file, error)) return;
  const std::filesystem::path target = std::filesystem::read_symlink(file, error);
  if (!error && !target.is_absolute() && !target.empty()) {
    if (!target.has_parent_path() && target != "..") return;
    auto part = target.begin();
    while (part != target.end() && *part == "..") ++part;
    if (part != target.end() && *part == "blobs" && ++part != target.end() && *part != ".." && ++part == target.end())
      return;
  }
  fail(ErrorKind::data,
       fmt::format("{} is a link that leaves its directory (to '{}'); copy the file there, or give the directory "
                   "that holds it",
                   file.string(), target.string()));
}

std::map<std::string, SafetensorsEntry> read_indexed(const std::filesystem::path& model_dir) {
  const std::filesystem::path index = model_dir / kIndexFile;
  check_link(index);
  const nlohmann::json root = read_json_file(index);
  if (!root.is_object() || !root.contains("weight_map") || !root["weight_map"].is_object())
    fail(ErrorKind::data, fmt::format("{}: 'weight_map' is missing or no object", index.string()));
  std::map<std::string, std::vector<std::string>> tensors_of_file;
  for (const auto& [tensor, file] : root["weight_map"].items()) {
    if (!file.is_string())
      fail(ErrorKind::data, fmt::format("{}: weight_map '{}' is no string", index.string(), printable(tensor)));
    check_plain_name(index, file.get<std::string>());
    tensors_of_file[file.get<std::string>()].push_back(tensor);
  }
  std::map<std::string, SafetensorsEntry> all;
  for (const auto& [file, tensors] : tensors_of_file) {
    auto entries = read_safetensors_header(model_dir / file);
    for (const std::string& tensor : tensors) {
      const auto it = entries.find(tensor);
      if (it == entries.end())
        fail(ErrorKind::data, fmt::format("{}: tensor '{}' should be in {}, but is not there; fetch the model again",
                                          index.string(), printable(tensor), file));
      all.emplace(tensor, std::move(it->second));
    }
  }
  return all;
}

}  // namespace

std::int64_t SafetensorsEntry::numel() const {
  std::int64_t product = 1;
  for (const std::int64_t extent : shape) product *= extent;
  return product;
}

std::map<std::string, SafetensorsEntry> read_safetensors_header(const std::filesystem::path& file) {
  check_link(file);
  const UniqueFd fd = open_for_reading(file);
  const std::uint64_t file_bytes = file_size(fd.get(), file);
  if (file_bytes < 8) refuse(file, fmt::format("{} bytes are too few for a header", file_bytes));
  std::uint64_t header_bytes = 0;
  pread_exactly(fd.get(), &header_bytes, 8, 0, file);
  if (header_bytes > kMaxHeaderBytes)
    refuse(file, fmt::format("a header of {} bytes is above the limit of {}", header_bytes, kMaxHeaderBytes));
  if (header_bytes > file_bytes - 8)
    refuse(file, fmt::format("the header of {} bytes does not fit into the file of {}", header_bytes, file_bytes));
  std::string text(header_bytes, '\0');
  pread_exactly(fd.get(), text.data(), text.size(), 8, file);
  // The format wants '{' first; the reference implementation lets blanks stand before it, and so do its files.
  const std::size_t first = text.find_first_not_of(" \t\r\n");
  if (first == std::string::npos || text[first] != '{') refuse(file, "the header does not begin with '{'");

  const nlohmann::json header = parse_json(text, file.string(), {.max_bytes = kMaxHeaderBytes, .max_depth = 4});
  std::map<std::string, SafetensorsEntry> entries;
  for (const auto& [name, info] : header.items()) {
    if (name == "__metadata__")
      check_metadata(file, info);
    else
      entries.emplace(name, parse_entry(file, name, info));
  }
  place_entries(file, entries, 8 + header_bytes, file_bytes);
  return entries;
}

std::map<std::string, SafetensorsEntry> read_model_headers(const std::filesystem::path& model_dir) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(model_dir, ignored))
    fail(ErrorKind::data,
         fmt::format("model directory {} does not exist (give a local directory with config.json and {})",
                     model_dir.string(), kSingleFile));
  if (std::filesystem::exists(model_dir / kSingleFile, ignored))
    return read_safetensors_header(model_dir / kSingleFile);
  if (std::filesystem::exists(model_dir / kIndexFile, ignored)) return read_indexed(model_dir);
  std::string advice;
  if (std::filesystem::exists(model_dir / "pytorch_model.bin", ignored) ||
      std::filesystem::exists(model_dir / "pytorch_model.bin.index.json", ignored))
    advice =
        "; it holds a pytorch_model.bin, a pickle that is not read for safety: convert it once with transformers, "
        "AutoModel.from_pretrained(DIR).save_pretrained(DIR, safe_serialization=True)";
  fail(ErrorKind::data,
       fmt::format("{} holds neither {} nor {}{}", model_dir.string(), kSingleFile, kIndexFile, advice));
}

}  // namespace shardtune
