#include "data/added_tokens.hpp"

#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <utf8proc.h>
#include <nlohmann/json.hpp>

#include "core/json.hpp"
#include "data/unicode.hpp"

namespace shardtune {

void TokenFinder::add(std::string_view pattern, std::int32_t token) {
  if (pattern.empty()) return;
  starts_[static_cast<unsigned char>(pattern.front())] = true;
  std::int32_t node = 0;
  for (const char byte : pattern) {
    const auto [it, is_new] = nodes_[static_cast<std::size_t>(node)].next.try_emplace(
        static_cast<unsigned char>(byte), static_cast<std::int32_t>(nodes_.size()));
    node = it->second;
    if (is_new) nodes_.emplace_back();
  }
  std::int32_t& owner = nodes_[static_cast<std::size_t>(node)].token;
  if (owner < 0) owner = token;
}

std::optional<TokenFinder::Found> TokenFinder::find(std::string_view text, std::size_t from) const {
  for (std::size_t begin = from; begin < text.size(); ++begin) {
    if (!starts_[static_cast<unsigned char>(text[begin])]) continue;
    std::optional<Found> found;
    std::int32_t node = 0;
    for (std::size_t at = begin; at < text.size(); ++at) {
      const auto& next = nodes_[static_cast<std::size_t>(node)].next;
      const auto it = next.find(static_cast<unsigned char>(text[at]));
      if (it == next.end()) break;
      node = it->second;
      const std::int32_t token = nodes_[static_cast<std::size_t>(node)].token;
      if (token >= 0) found = Found{begin, at + 1, token};
    }
    if (found) return found;
  }
  return std::nullopt;
}

namespace {

// \w of Rust's regular expressions: Alphabetic, marks, decimal digits, connectors, joiners.
bool is_word_character(char32_t c) {
  if (c < 0x80) return c == '_' || (c >= '0' && c <= '9') || ((c | 0x20) >= 'a' && (c | 0x20) <= 'z');
  if (c == 0x200C || c == 0x200D) return true;
  for (const unicode::CodePointRange& range : unicode::added_word_characters())
    if (c >= range.first && c <= range.last) return true;
  switch (utf8proc_category(static_cast<utf8proc_int32_t>(c))) {
    case UTF8PROC_CATEGORY_LU:
    case UTF8PROC_CATEGORY_LL:
    case UTF8PROC_CATEGORY_LT:
    case UTF8PROC_CATEGORY_LM:
    case UTF8PROC_CATEGORY_LO:
    case UTF8PROC_CATEGORY_MN:
    case UTF8PROC_CATEGORY_MC:
    case UTF8PROC_CATEGORY_ME:
    case UTF8PROC_CATEGORY_ND:
    case UTF8PROC_CATEGORY_NL:
    case UTF8PROC_CATEGORY_PC: return true;
    default:
      return (c >= 0x24B6 && c <= 0x24E9) || (c >= 0x1F130 && c <= 0x1F149) || (c >= 0x1F150 && c <= 0x1F169) ||
             (c >= 0x1F170 && c <= 0x1F189);  // Other_Alphabetic symbols
  }
}

bool ends_with_word(std::string_view text) {
  std::size_t at = text.size();
  return at > 0 && is_word_character(unicode::decode_before(text, at));
}
bool starts_with_word(std::string_view text) {
  std::size_t at = 0;
  return !text.empty() && is_word_character(unicode::decode(text, at));
}
std::size_t without_trailing_space(std::string_view text) {
  std::size_t end = text.size();
  for (std::size_t at = end; at > 0;) {
    if (!unicode::is_whitespace(unicode::decode_before(text, at))) break;
    end = at;
  }
  return end;
}
std::size_t leading_space(std::string_view text) {
  std::size_t begin = 0;
  for (std::size_t at = 0; at < text.size();) {
    if (!unicode::is_whitespace(unicode::decode(text, at))) break;
    begin = at;
  }
  return begin;
}

}  // namespace

AddedTokens::AddedTokens(std::vector<AddedToken> tokens, const Vocabulary& vocabulary, const Normalizer* normalizer,
                         const FieldPath& path)
    : tokens_(std::move(tokens)) {
  for (std::size_t i = 0; i < tokens_.size(); ++i) {
    const AddedToken& token = tokens_[i];
    const std::int32_t own = vocabulary.find(token.content);
    if (own >= 0 && own != token.id)
      path.child(i).refuse(fmt::format("'{}' has id {} here and {} in the vocabulary", token.content, token.id, own));
    if (own < 0 && vocabulary.has_id(token.id))
      path.child(i).refuse(fmt::format("id {} of '{}' belongs to '{}' in the vocabulary", token.id, token.content,
                                       vocabulary.token(token.id)));
    if (!by_content_.try_emplace(token.content, i).second)
      path.child(i).refuse(fmt::format("'{}' appears twice", token.content));
    if (!by_id_.try_emplace(token.id, i).second)
      path.child(i).refuse(fmt::format("id {} of '{}' is taken by another added token", token.id, token.content));
    const auto index = static_cast<std::int32_t>(i);
    if (!token.normalized) {
      raw_.add(token.content, index);
      continue;
    }
    TextArena arena;
    Piece piece{token.content, nullptr, -1, 0};
    if (normalizer != nullptr) piece = normalizer->apply(piece, arena);
    normalized_.add(piece.text, index);
  }
}

void AddedTokens::split(std::vector<Piece>& pieces, bool after_normalization) const {
  const TokenFinder& finder = after_normalization ? normalized_ : raw_;
  if (finder.empty()) {
    std::erase_if(pieces, [](const Piece& piece) { return piece.text.empty(); });
    return;
  }
  std::vector<Piece> out;
  for (const Piece& piece : pieces) {
    if (piece.added_id >= 0)
      out.push_back(piece);
    else
      split_piece(piece, finder, out);
  }
  pieces.swap(out);
}

void AddedTokens::split_piece(const Piece& piece, const TokenFinder& finder, std::vector<Piece>& out) const {
  const std::string_view text = piece.text;
  std::size_t done = 0;
  for (auto found = finder.find(text, 0); found; found = finder.find(text, found->end)) {
    const AddedToken& token = tokens_[static_cast<std::size_t>(found->token)];
    std::size_t begin = found->begin, end = found->end;
    if (token.single_word && (ends_with_word(text.substr(0, begin)) || starts_with_word(text.substr(end)))) continue;
    if (token.lstrip) begin = std::max(without_trailing_space(text.substr(0, begin)), done);
    if (token.rstrip) end += leading_space(text.substr(end));
    if (done < begin) out.push_back(piece.slice(done, begin));
    out.push_back(piece.slice(begin, end));
    out.back().added_id = token.id;
    done = end;
  }
  if (done < text.size()) out.push_back(piece.slice(done, text.size()));
}

const AddedToken* AddedTokens::find(std::string_view content) const {
  const auto it = by_content_.find(content);
  return it == by_content_.end() ? nullptr : &tokens_[it->second];
}
const AddedToken* AddedTokens::find(std::int32_t id) const {
  const auto it = by_id_.find(id);
  return it == by_id_.end() ? nullptr : &tokens_[it->second];
}
std::size_t AddedTokens::count_beyond(const Vocabulary& vocabulary) const {
  return static_cast<std::size_t>(std::count_if(
      tokens_.begin(), tokens_.end(), [&](const AddedToken& token) { return vocabulary.find(token.content) < 0; }));
}

std::vector<AddedToken> read_added_tokens(const nlohmann::json& array, const FieldPath& path) {
  std::vector<AddedToken> tokens;
  if (array.is_null()) return tokens;
  if (!array.is_array()) path.refuse("must be an array");
  for (std::size_t i = 0; i < array.size(); ++i) {
    const FieldPath item = path.child(i);
    const auto flag = [&](const char* name, bool fallback) {
      return json_get_or<bool>(array[i], name, fallback, item.str());
    };
    AddedToken token;
    token.content = json_get<std::string>(array[i], "content", item.str());
    if (token.content.empty()) continue;  // the library ignores these
    const auto id = json_get<std::int64_t>(array[i], "id", item.str());
    if (id < 0 || id > INT32_MAX) item.child("id").refuse(fmt::format("must be in [0, 2^31), got {}", id));
    token.id = static_cast<std::int32_t>(id);
    token.special = flag("special", false);
    token.single_word = flag("single_word", false);
    token.lstrip = flag("lstrip", false);
    token.rstrip = flag("rstrip", false);
    token.normalized = flag("normalized", !token.special);
    tokens.push_back(std::move(token));
  }
  return tokens;
}

}  // namespace shardtune
