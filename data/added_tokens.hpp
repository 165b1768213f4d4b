#pragma once
// The "added_tokens" section of tokenizer.json: tokens found in the text before the model sees it.
#include <cstdint>
#include <map>
#include <memory>
#include <optional>
#include <string>
#include <string_view>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "data/aligned_text.hpp"
#include "data/normalizer.hpp"
#include "data/tokenizer_error.hpp"
#include "data/vocabulary.hpp"

namespace shardtune {

struct AddedToken {
  std::string content;
  std::int32_t id = 0;
  bool special = false, single_word = false, lstrip = false, rstrip = false, normalized = false;
};

// Finds the leftmost and there the longest of a set of strings. Immutable.
class TokenFinder {
 public:
  void add(std::string_view pattern, std::int32_t token);  // an empty pattern is ignored
  struct Found {
    std::size_t begin, end;
    std::int32_t token;
  };
  std::optional<Found> find(std::string_view text, std::size_t from) const;
  bool empty() const { return nodes_.size() == 1; }

 private:
  struct Node {
    std::map<unsigned char, std::int32_t> next;
    std::int32_t token = -1;
  };
  std::vector<Node> nodes_{1};
  bool starts_[256] = {};
};

// Immutable after construction.
class AddedTokens {
 public:
  // Error{data}: a token whose id contradicts the vocabulary or another token.
  AddedTokens(std::vector<AddedToken> tokens, const Vocabulary& vocabulary, const Normalizer* normalizer,
              const FieldPath& path);

  // Cuts out the tokens matched before normalisation (normalized = false) or after it.
  void split(std::vector<Piece>& pieces, bool after_normalization) const;

  const AddedToken* find(std::string_view content) const;
  const AddedToken* find(std::int32_t id) const;
  std::size_t count_beyond(const Vocabulary& vocabulary) const;  // tokens that the model does not have

 private:
  void split_piece(const Piece& piece, const TokenFinder& finder, std::vector<Piece>& out) const;

  std::vector<AddedToken> tokens_;
  std::map<std::string, std::size_t, std::less<>> by_content_;
  std::map<std::int32_t, std::size_t> by_id_;
  TokenFinder raw_, normalized_;
};

std::vector<AddedToken> read_added_tokens(const nlohmann::json& array, const FieldPath& path);

}  // namespace shardtune
