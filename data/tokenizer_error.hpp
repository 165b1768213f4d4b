#pragma once
// One way to refuse a tokenizer file: Error{data} that begins with the file and the field.
#include <cstdint>
#include <string>

#include <nlohmann/json.hpp>

#include "core/error.hpp"

namespace shardtune {

// Where in a tokenizer file something stands: "dir/tokenizer.json: normalizer.normalizers[1]".
struct FieldPath {
  std::string file;
  std::string field;

  FieldPath child(const std::string& name) const { return {file, field.empty() ? name : field + "." + name}; }
  FieldPath child(std::size_t index) const { return {file, field + "[" + std::to_string(index) + "]"}; }
  std::string str() const { return field.empty() ? file : file + ": " + field; }
  [[noreturn]] void refuse(const std::string& what) const { fail(ErrorKind::data, str() + ": " + what); }
};

// The "type" of a normalizer, pre-tokenizer or post-processor.
inline std::string component_type(const nlohmann::json& value, const FieldPath& path) {
  if (!value.is_object() || !value.contains("type") || !value["type"].is_string())
    path.refuse("must be an object with a string 'type'");
  return value["type"].get<std::string>();
}

}  // namespace shardtune
