// Ids of published tokenizers against encodings that Hugging Face's libraries made (SHARDTUNE_TEST_DATA).
#include "tests/data/tokenizer_support.hpp"

namespace shardtune {
namespace {

// The names of one tokenizer in the files of tokenizers/reference.
struct Published {
  const char* name;          // directory
  const char* case_list;     // key in tokenizer_tests.json, or nullptr
  const char* long_text;     // file with one long text, or nullptr
  const char* multilingual;  // confB_<...>.json, or nullptr
};

class TokenizerReference : public testing::TestWithParam<Published> {
 protected:
  void SetUp() override {
    const std::filesystem::path dir = published_tokenizer(GetParam().name);
    if (dir.empty()) GTEST_SKIP() << "SHARDTUNE_TEST_DATA is not set";
    tokenizer_ = load_tokenizer(dir);
  }
  void expect_ids(const nlohmann::json& text, const nlohmann::json& ids) {
    EXPECT_EQ(nlohmann::json(tokenizer_->encode(text.get<std::string>(), std::nullopt, {}).ids), ids) << text;
    ++compared_;
  }
  std::unique_ptr<Tokenizer> tokenizer_;
  int compared_ = 0;
};

TEST_P(TokenizerReference, IdsEqualHuggingFaces) {
  if (GetParam().case_list != nullptr) {
    const nlohmann::json cases = reference_file("tokenizer_tests.json").at(GetParam().case_list);
    for (const auto& row : cases) expect_ids(row.at("input"), row.at("encoded").at("input_ids"));
    EXPECT_EQ(compared_, 18);
  }
  if (GetParam().long_text != nullptr) {
    const nlohmann::json row = reference_file(GetParam().long_text);
    expect_ids(row.at("text"), row.at("token_ids"));
  }
  if (GetParam().multilingual != nullptr) {
    const nlohmann::json inputs = reference_file("confB_inputs.json");
    const nlohmann::json expected =
        reference_file(std::string("confB_") + GetParam().multilingual + ".json").at("entries");
    ASSERT_EQ(inputs.size(), expected.size());
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      ASSERT_EQ(inputs[i].at("id"), expected[i].at("id"));
      expect_ids(inputs[i].at("text"), expected[i].at("input_ids"));
    }
  }
  EXPECT_GE(compared_, 18);
}

INSTANTIATE_TEST_SUITE_P(
    Published, TokenizerReference,
    testing::Values(Published{"bert-base-uncased", "bert-base-uncased", "bert_uncased_encoded.json", "bge"},
                    Published{"gpt2", "distilgpt2", "gpt2_encoded_tokens.json", "gpt2"},
                    Published{"llama-2", "coreml-projects/Llama-2-7b-chat-coreml", "llama_encoded.json", "tinyllama"},
                    Published{"llama-3-8b-instruct", "pcuenq/Llama-3.2-1B-Instruct-tokenizer", "llama_3.2_encoded.json",
                              nullptr},
                    Published{"qwen2.5", nullptr, nullptr, "qwen2.5"},
                    Published{"roberta-base", nullptr, nullptr, "roberta"}),
    [](const testing::TestParamInfo<Published>& test) {
      std::string name = test.param.name;
      std::erase_if(name, [](char c) { return c == '-' || c == '.'; });
      return name;
    });

}  // namespace
}  // namespace shardtune
