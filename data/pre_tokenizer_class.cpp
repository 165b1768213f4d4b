// Splitting by character class.
#include <string>
#include <utility>

#include "data/pre_tokenizer.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

// Appends a part unless it is empty.
void emit(const Piece& piece, std::size_t begin, std::size_t end, std::vector<Piece>& out) {
  if (begin < end) out.push_back(piece.slice(begin, end));
}

// White space goes, each punctuation character stands alone.
class BertPreTokenizer final : public PreTokenizer {
 public:
  void apply(std::vector<Piece>& pieces, SplitScratch& scratch) const override {
    std::vector<Piece>& out = scratch.pieces;
    out.clear();
    for (const Piece& piece : pieces) {
      if (piece.added_id >= 0)
        out.push_back(piece);
      else
        split(piece, out);
    }
    pieces.swap(out);
  }

 private:
  static void split(const Piece& piece, std::vector<Piece>& out) {
    std::size_t word = 0;
    for (std::size_t at = 0; at < piece.text.size();) {
      const std::size_t begin = at;
      const auto byte = static_cast<unsigned char>(piece.text[at]);
      if (static_cast<unsigned char>((byte | 0x20) - 'a') < 26 || static_cast<unsigned char>(byte - '0') < 10) {
        ++at;
        continue;
      }
      const char32_t c = unicode::decode(piece.text, at);
      const bool is_space = unicode::is_whitespace(c);
      if (!is_space && !unicode::is_punctuation(c)) continue;
      emit(piece, word, begin, out);
      if (!is_space) emit(piece, begin, at, out);
      word = at;
    }
    emit(piece, word, piece.text.size(), out);
  }
};

class ClassPreTokenizer final : public PreTokenizer {
 public:
  ClassPreTokenizer(CharClass is_match, SplitBehavior behavior) : is_match_(is_match), behavior_(behavior) {}
  void apply(std::vector<Piece>& pieces, SplitScratch& scratch) const override {
    std::vector<Piece>& out = scratch.pieces;
    out.clear();
    std::vector<Match> matches;
    for (const Piece& piece : pieces) {
      if (piece.added_id >= 0) {
        out.push_back(piece);
        continue;
      }
      matches.clear();
      for (std::size_t at = 0; at < piece.text.size();) {
        const std::size_t begin = at;
        const bool match = is_match_(unicode::decode(piece.text, at));
        if (!match && !matches.empty() && !matches.back().is_match)
          matches.back().end = at;
        else
          matches.push_back({begin, at, match});
      }
      split_by_matches(piece, matches, behavior_, out);
    }
    pieces.swap(out);
  }

 private:
  CharClass is_match_;
  SplitBehavior behavior_;
};

}  // namespace

void split_by_matches(const Piece& piece, const std::vector<Match>& matches, SplitBehavior behavior,
                      std::vector<Piece>& out) {
  const std::size_t count = matches.size();
  if (behavior == SplitBehavior::isolated || behavior == SplitBehavior::removed) {
    for (const Match& match : matches)
      if (behavior == SplitBehavior::isolated || !match.is_match) emit(piece, match.begin, match.end, out);
    return;
  }
  // The rest join neighbours: first and last match of each part.
  const auto joins_previous = [&](std::size_t i) {
    if (i == 0) return false;
    const bool is_match = matches[i].is_match, previous = matches[i - 1].is_match;
    if (behavior == SplitBehavior::contiguous) return is_match == previous;
    if (behavior == SplitBehavior::merged_with_previous) return is_match && !previous;
    return previous && !is_match;
  };
  for (std::size_t i = 0; i < count;) {
    std::size_t end = i + 1;
    while (end < count && joins_previous(end)) ++end;
    emit(piece, matches[i].begin, matches[end - 1].end, out);
    i = end;
  }
}

SplitBehavior parse_split_behavior(const std::string& name, const FieldPath& path) {
  if (name == "Removed") return SplitBehavior::removed;
  if (name == "Isolated") return SplitBehavior::isolated;
  if (name == "MergedWithPrevious") return SplitBehavior::merged_with_previous;
  if (name == "MergedWithNext") return SplitBehavior::merged_with_next;
  if (name == "Contiguous") return SplitBehavior::contiguous;
  path.refuse("unknown behavior '" + name + "'");
}

std::unique_ptr<PreTokenizer> make_bert_pre_tokenizer() { return std::make_unique<BertPreTokenizer>(); }
std::unique_ptr<PreTokenizer> make_class_pre_tokenizer(CharClass is_match, SplitBehavior behavior) {
  return std::make_unique<ClassPreTokenizer>(is_match, behavior);
}

}  // namespace shardtune
