#pragma once
// Files with given content, and a tokenizer small enough to foresee its ids: word "w7" is id 7, [CLS] is 1, [SEP] is 2.
#include <cstdint>
#include <fstream>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <gtest/gtest.h>

#include "core/error.hpp"
#include "data/tokenizer.hpp"
#include "tests/checkpoint/temp_dir.hpp"

namespace shardtune {

inline std::filesystem::path write_file(const TempDir& dir, const std::string& name, std::string_view content) {
  std::ofstream(dir / name, std::ios::binary) << content;
  return dir / name;
}

// What a call that must fail says; the temporary directory is cut off, so that messages can be compared as a whole.
template <class Call>
std::string error_of(const TempDir& dir, Call&& call, ErrorKind kind = ErrorKind::data) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), kind) << error.what();
    std::string message = error.what();
    const std::string prefix = dir.path().string() + "/";
    for (auto at = message.find(prefix); at != std::string::npos; at = message.find(prefix))
      message.erase(at, prefix.size());
    return message;
  }
  return "nothing was thrown";
}

class WordTokenizer final : public Tokenizer {
 public:
  explicit WordTokenizer(bool has_special_tokens = true) : has_special_tokens_(has_special_tokens) {}

  Encoding encode(std::string_view text, std::optional<std::string_view> pair,
                  const EncodeOptions& options) const override {
    std::vector<std::int32_t> first = words(text), second = pair ? words(*pair) : std::vector<std::int32_t>{};
    const std::int64_t num_special = has_special_tokens_ ? (pair ? 3 : 2) : 0;
    if (options.max_length > 0) {
      while (size(first) + size(second) + num_special > options.max_length)
        (size(second) > size(first) ? second : first).pop_back();
    }
    Encoding encoding;
    if (has_special_tokens_) add(encoding, {1}, 0);
    add(encoding, first, 0);
    if (has_special_tokens_) add(encoding, {2}, 0);
    add(encoding, second, 1);
    if (has_special_tokens_ && pair) add(encoding, {2}, 1);
    return encoding;
  }
  std::int64_t vocab_size() const override { return 1000; }
  std::optional<std::int32_t> token_to_id(std::string_view) const override { return std::nullopt; }
  std::string id_to_token(std::int32_t id) const override { return "w" + std::to_string(id); }

 private:
  static std::int64_t size(const std::vector<std::int32_t>& ids) { return static_cast<std::int64_t>(ids.size()); }
  static void add(Encoding& encoding, const std::vector<std::int32_t>& ids, std::int32_t type) {
    encoding.ids.insert(encoding.ids.end(), ids.begin(), ids.end());
    encoding.type_ids.insert(encoding.type_ids.end(), ids.size(), type);
  }
  static std::vector<std::int32_t> words(std::string_view text) {
    std::vector<std::int32_t> ids;
    for (std::size_t begin = 0; begin < text.size();) {
      const std::size_t end = std::min(text.find(' ', begin), text.size());
      if (end > begin) ids.push_back(std::stoi(std::string(text.substr(begin + 1, end - begin - 1))));
      begin = end + 1;
    }
    return ids;
  }
  bool has_special_tokens_;
};

}  // namespace shardtune
