#pragma once
// The "model" section of tokenizer.json: WordPiece and BPE.
#include <cstdint>
#include <memory>
#include <string_view>
#include <vector>

#include "data/tokenizer_json.hpp"
#include "data/vocabulary.hpp"

namespace shardtune {

// One token of a word, and how many bytes of the word it stands for.
struct WordToken {
  std::int32_t id;
  std::uint32_t length;
};

// What tokenize() needs to work in; one per encode().
struct ModelScratch {
  std::vector<WordToken> symbols;
  std::vector<std::int32_t> next, previous;
  std::vector<std::uint32_t> hashes;
  std::vector<std::uint64_t> heap;
};

// Immutable; tokenize() may be called from many threads with a scratch each.
class SubwordModel {
 public:
  virtual ~SubwordModel() = default;
  // Appends the tokens of a non-empty word. The lengths need not sum up to the word's where the model drops characters.
  virtual void tokenize(std::string_view word, ModelScratch& scratch, std::vector<WordToken>& out) const = 0;
  virtual const Vocabulary& vocabulary() const = 0;
};

// Greedy longest match first (Google BERT's algorithm). Error{data} for a malformed section.
std::unique_ptr<SubwordModel> make_wordpiece(const TokenizerJson& file, const FieldPath& path);
// Byte pair encoding. byte_level: words are raw bytes and the vocabulary spells bytes as GPT-2's printable characters.
std::unique_ptr<SubwordModel> make_bpe(const TokenizerJson& file, const FieldPath& path, bool byte_level);

}  // namespace shardtune
