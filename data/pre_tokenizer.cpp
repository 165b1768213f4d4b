#include "data/pre_tokenizer.hpp"

#include <optional>
#include <string>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/json.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

constexpr int kMaxSequenceDepth = 8;
constexpr const char* kGpt2Words = R"('s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+)";
// Rust's \w: Alphabetic, marks, decimal digits, connectors and joiners.
constexpr const char* kWordCharacters = R"(\p{Alphabetic}\p{M}\p{Nd}\p{Pc}\x{200C}\x{200D})";

template <class Split>
void for_each_text(std::vector<Piece>& pieces, SplitScratch& scratch, const Split& split) {
  scratch.pieces.clear();
  for (const Piece& piece : pieces) {
    if (piece.added_id >= 0)
      scratch.pieces.push_back(piece);
    else
      split(piece, scratch.pieces);
  }
  pieces.swap(scratch.pieces);
}

// Cuts at the matches of a string or an expression.
class SplitPreTokenizer final : public PreTokenizer {
 public:
  struct Pattern {
    std::string literal;
    std::optional<Regex> regex;
  };
  SplitPreTokenizer(Pattern pattern, SplitBehavior behavior, bool invert)
      : pattern_(std::move(pattern)), behavior_(behavior), invert_(invert) {}

  void apply(std::vector<Piece>& pieces, SplitScratch& scratch) const override {
    std::vector<Match> matches;
    for_each_text(pieces, scratch, [&](const Piece& piece, std::vector<Piece>& out) {
      if (behavior_ == SplitBehavior::isolated) return isolate(piece, scratch.regex, out);
      matches.clear();
      std::size_t done = 0;
      for_each_match(piece.text, scratch.regex, [&](std::size_t begin, std::size_t end) {
        if (done < begin) matches.push_back({done, begin, invert_});
        matches.push_back({begin, end, !invert_});
        done = end;
      });
      if (done < piece.text.size()) matches.push_back({done, piece.text.size(), invert_});
      split_by_matches(piece, matches, behavior_, out);
    });
  }

 private:
  void isolate(const Piece& piece, RegexScratch& scratch, std::vector<Piece>& out) const {
    std::size_t done = 0;
    for_each_match(piece.text, scratch, [&](std::size_t begin, std::size_t end) {
      if (done < begin) out.push_back(piece.slice(done, begin));
      if (begin < end) out.push_back(piece.slice(begin, end));
      done = end;
    });
    if (done < piece.text.size()) out.push_back(piece.slice(done, piece.text.size()));
  }

  template <class OnMatch>
  void for_each_match(std::string_view text, RegexScratch& scratch, const OnMatch& on_match) const {
    std::size_t last_end = std::string_view::npos;
    for (std::size_t from = 0; from <= text.size();) {
      const auto [begin, end] = find(text, from, scratch);
      if (begin == std::string_view::npos) return;
      if (begin == end && last_end == end) {  // an empty match right behind another one does not count
        from += from < text.size() ? unicode::sequence_length(text[from]) : 1;
        continue;
      }
      on_match(begin, end);
      from = last_end = end;
    }
  }

  std::pair<std::size_t, std::size_t> find(std::string_view text, std::size_t from, RegexScratch& scratch) const {
    if (pattern_.regex) return pattern_.regex->find(text, from, scratch);
    const std::size_t begin = pattern_.literal.empty() ? std::string_view::npos : text.find(pattern_.literal, from);
    return {begin, begin == std::string_view::npos ? begin : begin + pattern_.literal.size()};
  }

  Pattern pattern_;
  SplitBehavior behavior_;
  bool invert_;
};

// ByteLevel's add_prefix_space.
class PrefixSpace final : public PreTokenizer {
 public:
  void apply(std::vector<Piece>& pieces, SplitScratch& scratch) const override {
    for (Piece& piece : pieces)
      if (piece.added_id < 0 && piece.text.front() != ' ') piece = prepend(piece, " ", scratch.arena);
  }
};

enum class PrependScheme { always, first, never };

// Spaces become a visible character (U+2581) that begins words.
class Metaspace final : public PreTokenizer {
 public:
  Metaspace(std::string replacement, PrependScheme scheme, bool split)
      : replacement_(std::move(replacement)), scheme_(scheme), split_(split) {}

  void apply(std::vector<Piece>& pieces, SplitScratch& scratch) const override {
    for_each_text(pieces, scratch, [&](const Piece& piece, std::vector<Piece>& out) {
      const Piece replaced = replace_spaces(piece, scratch.arena);
      if (!split_) {
        out.push_back(replaced);
        return;
      }
      // A replacement joins the text behind it; several in a row stand alone but for the last.
      std::size_t begin = 0;
      for (std::size_t at = replaced.text.find(replacement_, 1); at != std::string_view::npos;
           at = replaced.text.find(replacement_, at + replacement_.size())) {
        out.push_back(replaced.slice(begin, at));
        begin = at;
      }
      out.push_back(replaced.slice(begin, replaced.text.size()));
    });
  }

 private:
  Piece replace_spaces(const Piece& piece, TextArena& arena) const {
    TextBuilder out(piece);
    for (std::size_t at = 0; at < piece.text.size(); ++at) {
      if (piece.text[at] == ' ')
        out.add(replacement_, out.tracked ? piece.align[at] : ByteRange{});
      else
        out.copy(piece, at, at + 1);
    }
    const Piece replaced = arena.store(piece, std::move(out.text), std::move(out.align));
    const bool wanted = scheme_ == PrependScheme::always || (scheme_ == PrependScheme::first && piece.origin == 0);
    if (!wanted || replaced.text.substr(0, replacement_.size()) == replacement_) return replaced;
    return prepend(replaced, replacement_, arena);
  }

  std::string replacement_;
  PrependScheme scheme_;
  bool split_;
};

class SequencePreTokenizer final : public PreTokenizer {
 public:
  explicit SequencePreTokenizer(std::vector<std::unique_ptr<PreTokenizer>> steps) : steps_(std::move(steps)) {}
  void apply(std::vector<Piece>& pieces, SplitScratch& scratch) const override {
    for (const auto& step : steps_) step->apply(pieces, scratch);
  }

 private:
  std::vector<std::unique_ptr<PreTokenizer>> steps_;
};

// Reads the section into a flat list of steps.
class Builder {
 public:
  void add(const nlohmann::json& value, const FieldPath& path, int depth) {
    const std::string type = component_type(value, path);
    if (plan.byte_level) path.refuse("'" + type + "' after a ByteLevel is not supported");
    const std::string origin = path.str();
    const auto behavior = [&](const char* fallback) {
      return parse_split_behavior(json_get_or<std::string>(value, "behavior", fallback, origin),
                                  path.child("behavior"));
    };
    if (type == "Sequence") return add_sequence(value, path, depth);
    if (type == "ByteLevel") return add_byte_level(value, path);
    if (type == "Metaspace") return add_metaspace(value, path);
    if (type == "Split") return add_split(value, path);
    if (type == "BertPreTokenizer") return push(make_bert_pre_tokenizer());
    if (type == "WhitespaceSplit")
      return push(make_class_pre_tokenizer(unicode::is_whitespace, SplitBehavior::removed));
    if (type == "Punctuation") return push(make_class_pre_tokenizer(unicode::is_punctuation, behavior("Isolated")));
    if (type == "Digits") {
      const bool individual = json_get_or<bool>(value, "individual_digits", false, origin);
      return push(make_class_pre_tokenizer(unicode::is_numeric,
                                           individual ? SplitBehavior::isolated : SplitBehavior::contiguous));
    }
    if (type == "Whitespace") return add_whitespace(path);
    if (type == "CharDelimiterSplit")
      return push_split({json_get<std::string>(value, "delimiter", origin), std::nullopt}, SplitBehavior::removed,
                        false);
    path.refuse("pre-tokenizer '" + type + "' is not supported yet");
  }

  PreTokenizerPlan finish() {
    if (!steps_.empty()) plan.pre_tokenizer = std::make_unique<SequencePreTokenizer>(std::move(steps_));
    return std::move(plan);
  }

  PreTokenizerPlan plan;

 private:
  void push(std::unique_ptr<PreTokenizer> step) { steps_.push_back(std::move(step)); }
  void push_split(SplitPreTokenizer::Pattern pattern, SplitBehavior behavior, bool invert) {
    push(std::make_unique<SplitPreTokenizer>(std::move(pattern), behavior, invert));
  }

  void add_sequence(const nlohmann::json& value, const FieldPath& path, int depth) {
    if (depth >= kMaxSequenceDepth) path.refuse("Sequence is nested too deep");
    const auto list = value.find("pretokenizers");
    if (list == value.end() || !list->is_array()) path.child("pretokenizers").refuse("must be an array");
    for (std::size_t i = 0; i < list->size(); ++i) add((*list)[i], path.child("pretokenizers").child(i), depth + 1);
  }

  void add_byte_level(const nlohmann::json& value, const FieldPath& path) {
    if (json_get_or<bool>(value, "add_prefix_space", true, path.str())) push(std::make_unique<PrefixSpace>());
    if (json_get_or<bool>(value, "use_regex", true, path.str()))
      push_split({"", Regex(kGpt2Words, path)}, SplitBehavior::isolated, false);
    plan.byte_level = true;
  }

  void add_metaspace(const nlohmann::json& value, const FieldPath& path) {
    auto replacement = json_get_or<std::string>(value, "replacement", "\xE2\x96\x81", path.str());
    if (unicode::count_code_points(replacement) != 1) path.child("replacement").refuse("must be one character");
    const bool legacy = json_get_or<bool>(value, "add_prefix_space", true, path.str());
    const auto scheme = json_get_or<std::string>(value, "prepend_scheme", legacy ? "always" : "never", path.str());
    if (scheme != "always" && scheme != "first" && scheme != "never")
      path.child("prepend_scheme").refuse("must be always, first or never, got '" + scheme + "'");
    if (scheme == "first") plan.needs_alignment = true;
    const PrependScheme parsed = scheme == "always"  ? PrependScheme::always
                                 : scheme == "first" ? PrependScheme::first
                                                     : PrependScheme::never;
    push(std::make_unique<Metaspace>(std::move(replacement), parsed,
                                     json_get_or<bool>(value, "split", true, path.str())));
  }

  void add_split(const nlohmann::json& value, const FieldPath& path) {
    const FieldPath field = path.child("pattern");
    const auto pattern = value.find("pattern");
    if (pattern == value.end() || !pattern->is_object() || pattern->size() != 1)
      field.refuse("must be {\"String\": ...} or {\"Regex\": ...}");
    const SplitBehavior behavior =
        parse_split_behavior(json_get<std::string>(value, "behavior", path.str()), path.child("behavior"));
    const bool invert = json_get_or<bool>(value, "invert", false, path.str());
    if (pattern->contains("String"))
      push_split({json_get<std::string>(*pattern, "String", field.str()), std::nullopt}, behavior, invert);
    else
      push_split({"", Regex(json_get<std::string>(*pattern, "Regex", field.str()), field)}, behavior, invert);
  }

  void add_whitespace(const FieldPath& path) {
    std::string word = kWordCharacters;
    for (const unicode::CodePointRange& range : unicode::added_word_characters()) {
      unicode::append(word, range.first);
      word += '-';
      unicode::append(word, range.last);
    }
    push_split({"", Regex("[" + word + "]+|[^" + word + "\\s]+", path)}, SplitBehavior::removed, true);
  }

  std::vector<std::unique_ptr<PreTokenizer>> steps_;
};

}  // namespace

PreTokenizerPlan make_pre_tokenizer(const nlohmann::json& value, const FieldPath& path) {
  Builder builder;
  if (!value.is_null()) builder.add(value, path, 0);
  return builder.finish();
}

}  // namespace shardtune
