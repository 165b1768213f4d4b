#pragma once
// The "pre_tokenizer" section of tokenizer.json: how text is cut into words before the model sees it.
#include <memory>
#include <vector>

#include <nlohmann/json_fwd.hpp>

#include "data/aligned_text.hpp"
#include "data/regex.hpp"
#include "data/tokenizer_error.hpp"

namespace shardtune {

// What a pre-tokenizer works in during one encode().
struct SplitScratch {
  TextArena& arena;
  RegexScratch& regex;
  std::vector<Piece> pieces;  // spare
};

// Immutable; apply() may be called from many threads with a scratch each.
class PreTokenizer {
 public:
  virtual ~PreTokenizer() = default;
  // Replaces each piece that is no added token by its parts, in order; empty parts vanish.
  virtual void apply(std::vector<Piece>& pieces, SplitScratch& scratch) const = 0;
};

struct PreTokenizerPlan {
  std::unique_ptr<PreTokenizer> pre_tokenizer;  // nullptr: nothing to do
  bool byte_level = false;                      // the model gets raw bytes (a ByteLevel, which must be the last)
  bool needs_alignment = false;                 // works right on aligned pieces only
};
// Error{data} for a type that is not supported.
PreTokenizerPlan make_pre_tokenizer(const nlohmann::json& value, const FieldPath& path);

// What becomes of the matches of a pattern.
enum class SplitBehavior { removed, isolated, merged_with_previous, merged_with_next, contiguous };
struct Match {
  std::size_t begin, end;
  bool is_match;
};
// matches cover the piece from begin to end in order; appends the parts to out.
void split_by_matches(const Piece& piece, const std::vector<Match>& matches, SplitBehavior behavior,
                      std::vector<Piece>& out);
SplitBehavior parse_split_behavior(const std::string& name, const FieldPath& path);

// Pre-tokenizers by character class, with a loop of their own for BERT.
std::unique_ptr<PreTokenizer> make_bert_pre_tokenizer();
using CharClass = bool (*)(char32_t);
std::unique_ptr<PreTokenizer> make_class_pre_tokenizer(CharClass is_match, SplitBehavior behavior);

}  // namespace shardtune
