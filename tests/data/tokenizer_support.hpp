#pragma once
// What the tokenizer tests share: golden rows, files of SHARDTUNE_TEST_DATA, scratch directories.
#include <filesystem>
#include <string>
#include <vector>

#include <gtest/gtest.h>
#include <nlohmann/json.hpp>

#include "data/tokenizer.hpp"

namespace shardtune {

std::filesystem::path golden_tokenizer(const std::string& name);  // a directory of tests/golden/tokenizers
std::vector<nlohmann::json> read_jsonl(const std::filesystem::path& file);

// The directory of a published tokenizer in SHARDTUNE_TEST_DATA, unpacked where it is stored as .xz; empty when the
// variable is unset.
std::filesystem::path published_tokenizer(const std::string& name);
// A file of SHARDTUNE_TEST_DATA/tokenizers/reference.
nlohmann::json reference_file(const std::string& name);

// A new directory under the system's temporary one holding tokenizer.json; removed at the end.
class TokenizerDir {
 public:
  explicit TokenizerDir(const std::string& tokenizer_json);
  ~TokenizerDir();
  TokenizerDir(const TokenizerDir&) = delete;
  TokenizerDir& operator=(const TokenizerDir&) = delete;
  const std::filesystem::path& path() const { return path_; }

 private:
  std::filesystem::path path_;
};

// Encodes every row of the golden directory and compares ids, types, tokens and offsets.
void expect_golden_rows(const std::string& name);
// The message with which a tokenizer.json is refused; fails when it is taken or refused with another kind than data.
std::string refusal(const std::string& tokenizer_json);

}  // namespace shardtune
