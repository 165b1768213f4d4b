#include "data/normalizer.hpp"

#include <optional>
#include <utility>

#include <nlohmann/json.hpp>

#include "core/json.hpp"
#include "data/regex.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

constexpr int kMaxSequenceDepth = 8;

class SequenceNormalizer final : public Normalizer {
 public:
  explicit SequenceNormalizer(std::vector<std::unique_ptr<Normalizer>> steps) : steps_(std::move(steps)) {}
  Piece apply(const Piece& piece, TextArena& arena) const override {
    Piece result = piece;
    for (const auto& step : steps_) result = step->apply(result, arena);
    return result;
  }

 private:
  std::vector<std::unique_ptr<Normalizer>> steps_;
};

class LowercaseNormalizer final : public Normalizer {
 public:
  Piece apply(const Piece& piece, TextArena& arena) const override {
    TextBuilder out(piece);
    for (std::size_t at = 0; at < piece.text.size();) {
      const ByteRange from = out.tracked ? piece.align[at] : ByteRange{};
      char32_t second = 0;
      out.add(unicode::lowercase(unicode::decode(piece.text, at), second), from);
      if (second != 0) out.add(second, from);
    }
    return arena.store(piece, std::move(out.text), std::move(out.align));
  }
};

class StripAccentsNormalizer final : public Normalizer {
 public:
  Piece apply(const Piece& piece, TextArena& arena) const override {
    TextBuilder out(piece);
    for (std::size_t at = 0; at < piece.text.size();) {
      const std::size_t begin = at;
      if (!unicode::is_combining_mark(unicode::decode(piece.text, at))) out.copy(piece, begin, at);
    }
    return arena.store(piece, std::move(out.text), std::move(out.align));
  }
};

class StripNormalizer final : public Normalizer {
 public:
  StripNormalizer(bool left, bool right) : left_(left), right_(right) {}
  Piece apply(const Piece& piece, TextArena& /*arena*/) const override {
    std::size_t begin = 0, end = piece.text.size();
    while (left_ && begin < end) {
      std::size_t at = begin;
      if (!unicode::is_whitespace(unicode::decode(piece.text, at))) break;
      begin = at;
    }
    while (right_ && end > begin) {
      std::size_t at = end;
      if (!unicode::is_whitespace(unicode::decode_before(piece.text, at))) break;
      end = at;
    }
    Piece result = piece.slice(begin, end);
    result.origin = piece.origin;
    return result;
  }

 private:
  bool left_, right_;
};

class PrependNormalizer final : public Normalizer {
 public:
  explicit PrependNormalizer(std::string prefix) : prefix_(std::move(prefix)) {}
  Piece apply(const Piece& piece, TextArena& arena) const override { return prepend(piece, prefix_, arena); }

 private:
  std::string prefix_;
};

class ReplaceNormalizer final : public Normalizer {
 public:
  ReplaceNormalizer(std::string literal, std::optional<Regex> regex, std::string content)
      : literal_(std::move(literal)), regex_(std::move(regex)), content_(std::move(content)) {}

  Piece apply(const Piece& piece, TextArena& arena) const override {
    TextBuilder out(piece);
    RegexScratch scratch;
    std::size_t done = 0;
    for (std::size_t from = 0; from <= piece.text.size();) {
      const auto [begin, end] = find(piece.text, from, scratch);
      if (begin == std::string_view::npos) break;
      out.copy(piece, done, begin);
      ByteRange origin{piece.origin, piece.origin};
      if (out.tracked && end > 0) origin = piece.align[end - 1];
      out.add(content_, origin);
      done = end;
      from = end;
      if (begin == end) from += end < piece.text.size() ? unicode::sequence_length(piece.text[end]) : 1;
    }
    if (done == 0 && out.text.empty()) return piece;
    out.copy(piece, done, piece.text.size());
    return arena.store(piece, std::move(out.text), std::move(out.align));
  }

 private:
  std::pair<std::size_t, std::size_t> find(std::string_view text, std::size_t from, RegexScratch& scratch) const {
    if (regex_) return regex_->find(text, from, scratch);
    const std::size_t begin = literal_.empty() ? std::string_view::npos : text.find(literal_, from);
    return {begin, begin == std::string_view::npos ? begin : begin + literal_.size()};
  }

  std::string literal_;
  std::optional<Regex> regex_;
  std::string content_;
};

std::unique_ptr<Normalizer> make_replace(const nlohmann::json& value, const FieldPath& path) {
  const FieldPath field = path.child("pattern");
  const auto pattern = value.find("pattern");
  if (pattern == value.end() || !pattern->is_object() || pattern->size() != 1)
    field.refuse("must be {\"String\": ...} or {\"Regex\": ...}");
  auto content = json_get<std::string>(value, "content", path.str());
  if (pattern->contains("String"))
    return std::make_unique<ReplaceNormalizer>(json_get<std::string>(*pattern, "String", field.str()), std::nullopt,
                                               std::move(content));
  return std::make_unique<ReplaceNormalizer>("", Regex(json_get<std::string>(*pattern, "Regex", field.str()), field),
                                             std::move(content));
}

std::unique_ptr<Normalizer> make(const nlohmann::json& value, const FieldPath& path, int depth) {
  const std::string type = component_type(value, path);
  const std::string origin = path.str();
  if (type == "BertNormalizer") {
    BertNormalizerOptions options;
    options.clean_text = json_get_or<bool>(value, "clean_text", true, origin);
    options.handle_cjk = json_get_or<bool>(value, "handle_chinese_chars", true, origin);
    options.lowercase = json_get_or<bool>(value, "lowercase", true, origin);
    options.strip_accents = json_get_or<bool>(value, "strip_accents", options.lowercase, origin);
    return make_bert_normalizer(options);
  }
  if (type == "NFC") return make_form_normalizer(NormalForm::nfc);
  if (type == "NFD") return make_form_normalizer(NormalForm::nfd);
  if (type == "NFKC") return make_form_normalizer(NormalForm::nfkc);
  if (type == "NFKD") return make_form_normalizer(NormalForm::nfkd);
  if (type == "Lowercase") return std::make_unique<LowercaseNormalizer>();
  if (type == "StripAccents") return std::make_unique<StripAccentsNormalizer>();
  if (type == "Strip")
    return std::make_unique<StripNormalizer>(json_get_or<bool>(value, "strip_left", true, origin),
                                             json_get_or<bool>(value, "strip_right", true, origin));
  if (type == "Prepend") return std::make_unique<PrependNormalizer>(json_get<std::string>(value, "prepend", origin));
  if (type == "Replace") return make_replace(value, path);
  if (type != "Sequence") path.refuse("normalizer '" + type + "' is not supported yet");
  if (depth >= kMaxSequenceDepth) path.refuse("Sequence is nested too deep");
  const auto list = value.find("normalizers");
  if (list == value.end() || !list->is_array()) path.child("normalizers").refuse("must be an array");
  std::vector<std::unique_ptr<Normalizer>> steps;
  for (std::size_t i = 0; i < list->size(); ++i)
    steps.push_back(make((*list)[i], path.child("normalizers").child(i), depth + 1));
  return std::make_unique<SequenceNormalizer>(std::move(steps));
}

}  // namespace

std::unique_ptr<Normalizer> make_normalizer(const nlohmann::json& value, const FieldPath& path) {
  return value.is_null() ? nullptr : make(value, path, 0);
}

}  // namespace shardtune
