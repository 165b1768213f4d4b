// Against what the tokenizers library gave for tests/golden/tokenizers (make_tokenizers.py).
#include "tests/data/tokenizer_support.hpp"

namespace shardtune {
namespace {

TEST(TokenizerGolden, WordPieceGivesTheLibrarysTokensAndOffsets) { expect_golden_rows("wordpiece"); }
TEST(TokenizerGolden, CasedWordPieceOfAFileWithoutModelTypeDoesToo) { expect_golden_rows("wordpiece_legacy"); }

TEST(TokenizerGolden, ByteLevelBpeWithSplitAndTemplate) { expect_golden_rows("byte_level"); }
TEST(TokenizerGolden, RobertaTrimsOffsetsAndMatchesMaskWithItsSpace) { expect_golden_rows("roberta"); }
TEST(TokenizerGolden, BpeWithByteFallbackAndMergesAsStrings) { expect_golden_rows("byte_fallback"); }
TEST(TokenizerGolden, BpeFusesUnknownCharacters) { expect_golden_rows("unknown_fused"); }
TEST(TokenizerGolden, NormalizerChainWithCharacterClassesAndMetaspace) { expect_golden_rows("classes"); }

TEST(TokenizerGolden, VocabularyCountsAddedTokensAndAnswersBothWays) {
  const auto tokenizer = load_tokenizer(golden_tokenizer("wordpiece"));
  const std::int64_t size = tokenizer->vocab_size();
  EXPECT_EQ(size, 215);  // 214 of the model and <extra>
  EXPECT_EQ(tokenizer->token_to_id("<extra>"), 214);
  EXPECT_EQ(tokenizer->id_to_token(214), "<extra>");
  EXPECT_EQ(tokenizer->token_to_id("[SEP]"), 3);
  EXPECT_EQ(tokenizer->id_to_token(3), "[SEP]");
  EXPECT_EQ(tokenizer->token_to_id("never seen"), std::nullopt);
  EXPECT_EQ(tokenizer->id_to_token(9999), "");
}

TEST(TokenizerGolden, WithoutSpecialTokensOnlyTheTextRemains) {
  const auto tokenizer = load_tokenizer(golden_tokenizer("wordpiece"));
  const Encoding encoding = tokenizer->encode("the dog", "lazy", {.add_special_tokens = false, .want_details = true});
  EXPECT_EQ(encoding.tokens, (std::vector<std::string>{"the", "dog", "lazy"}));
  EXPECT_EQ(encoding.type_ids, (std::vector<std::int32_t>{0, 0, 1}));
}

}  // namespace
}  // namespace shardtune
