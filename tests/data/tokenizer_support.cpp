#include "tests/data/tokenizer_support.hpp"

#include <unistd.h>

#include <cstdlib>
#include <fstream>
#include <sstream>

#include "core/error.hpp"

namespace shardtune {

std::filesystem::path golden_tokenizer(const std::string& name) {
  return std::filesystem::path(std::getenv("SHARDTUNE_SOURCE_DIR")) / "tests/golden/tokenizers" / name;
}

std::vector<nlohmann::json> read_jsonl(const std::filesystem::path& file) {
  std::vector<nlohmann::json> rows;
  std::ifstream input(file);
  for (std::string line; std::getline(input, line);) rows.push_back(nlohmann::json::parse(line));
  return rows;
}

TokenizerDir::TokenizerDir(const std::string& tokenizer_json) {
  std::string pattern = (std::filesystem::temp_directory_path() / "shardtune-tokenizer-XXXXXX").string();
  if (mkdtemp(pattern.data()) == nullptr) throw std::runtime_error("mkdtemp failed");
  path_ = pattern;
  std::ofstream(path_ / "tokenizer.json") << tokenizer_json;
}
TokenizerDir::~TokenizerDir() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::filesystem::path published_tokenizer(const std::string& name) {
  const char* data = std::getenv("SHARDTUNE_TEST_DATA");
  if (data == nullptr) return {};
  const std::filesystem::path stored = std::filesystem::path(data) / "tokenizers" / name;
  if (std::filesystem::exists(stored / "tokenizer.json")) return stored;
  // Unpacked once a process; the directory goes when the process ends.
  static std::vector<std::unique_ptr<TokenizerDir>> unpacked;
  unpacked.push_back(std::make_unique<TokenizerDir>(""));
  const std::filesystem::path into = unpacked.back()->path();
  const std::string command =
      "xz -dc '" + (stored / "tokenizer.json.xz").string() + "' > '" + (into / "tokenizer.json").string() + "'";
  if (std::system(command.c_str()) != 0) throw std::runtime_error("failed: " + command);
  return into;
}

nlohmann::json reference_file(const std::string& name) {
  const std::filesystem::path file =
      std::filesystem::path(std::getenv("SHARDTUNE_TEST_DATA")) / "tokenizers/reference" / name;
  std::ifstream input(file);
  if (!input) throw std::runtime_error("missing " + file.string());
  return nlohmann::json::parse(input);
}

void expect_golden_rows(const std::string& name) {
  const auto tokenizer = load_tokenizer(golden_tokenizer(name));
  const std::vector<nlohmann::json> rows = read_jsonl(golden_tokenizer(name) / "expected.jsonl");
  ASSERT_EQ(rows.size(), 60U);
  for (const nlohmann::json& row : rows) {
    SCOPED_TRACE(row.dump().substr(0, 200));
    std::optional<std::string> pair;
    if (row.contains("text_pair")) pair = row["text_pair"].get<std::string>();
    EncodeOptions options{.want_details = true, .max_length = row["max_length"].get<std::int64_t>()};
    const auto text = row["text"].get<std::string>();
    const Encoding full = tokenizer->encode(text, pair, options);
    EXPECT_EQ(nlohmann::json(full.ids), row["input_ids"]);
    EXPECT_EQ(nlohmann::json(full.type_ids), row["token_type_ids"]);
    EXPECT_EQ(nlohmann::json(full.tokens), row["tokens"]);
    EXPECT_EQ(nlohmann::json(full.offsets), row["offsets"]);
    options.want_details = false;  // another path through normalisation
    const Encoding ids = tokenizer->encode(text, pair, options);
    EXPECT_EQ(ids.ids, full.ids);
    EXPECT_EQ(ids.type_ids, full.type_ids);
    EXPECT_TRUE(ids.tokens.empty() && ids.offsets.empty());
  }
}

std::string refusal(const std::string& tokenizer_json) {
  const TokenizerDir dir(tokenizer_json);
  try {
    load_tokenizer(dir.path());
  } catch (const Error& e) {
    EXPECT_EQ(e.kind(), ErrorKind::data) << e.what();
    EXPECT_NE(std::string(e.what()).find(dir.path().string()), std::string::npos) << "names no file: " << e.what();
    return e.what();
  }
  ADD_FAILURE() << "taken: " << tokenizer_json.substr(0, 200);
  return "";
}

}  // namespace shardtune
