#include "data/post_processor.hpp"

#include <algorithm>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/json.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

constexpr int kMaxSequenceDepth = 8;

TemplatePiece text_piece(int sequence, std::int32_t type_id) { return {sequence, type_id, {}, {}}; }

std::int32_t read_id(const nlohmann::json& value, const FieldPath& path) {
  if (!value.is_number_integer() || value.get<std::int64_t>() < 0 || value.get<std::int64_t>() > INT32_MAX)
    path.refuse("must be a token id, got " + value.dump().substr(0, 80));
  return value.get<std::int32_t>();
}

// Spaces at the ends of a token, as themselves or as byte-level spelling (U+0120).
bool is_trimmed(char32_t c) { return c == 0x120 || unicode::is_whitespace(c); }

void trim_offsets(Encoding& encoding, bool add_prefix_space) {
  for (std::size_t i = 0; i < encoding.tokens.size(); ++i) {
    const std::string& token = encoding.tokens[i];
    auto& [begin, end] = encoding.offsets[i];
    std::int32_t leading = 0, trailing = 0;
    for (std::size_t at = 0; at < token.size() && is_trimmed(unicode::decode(token, at));) ++leading;
    for (std::size_t at = token.size(); at > 0 && is_trimmed(unicode::decode_before(token, at));) ++trailing;
    if (leading > 0) {
      // The space that the pre-tokenizer put before the text has no place in it.
      if ((i == 0 || begin == 0) && add_prefix_space) --leading;
      begin = std::min(begin + leading, end);
    }
    if (trailing > 0 && end >= trailing) end = std::max(end - trailing, begin);
  }
}

}  // namespace

PostProcessor::PostProcessor() : single_{text_piece(0, 0)}, pair_{text_piece(0, 0), text_piece(1, 1)} {}

PostProcessor::PostProcessor(const nlohmann::json& value, const FieldPath& path) : PostProcessor() {
  if (!value.is_null()) read(value, path, 0);
}

void PostProcessor::read(const nlohmann::json& value, const FieldPath& path, int depth) {
  const std::string type = component_type(value, path);
  if (type == "TemplateProcessing") return read_template(value, path);
  if (type == "BertProcessing") return read_bert_like(value, path, false);
  if (type == "RobertaProcessing") return read_bert_like(value, path, true);
  if (type == "ByteLevel") {
    if (json_get_or<bool>(value, "trim_offsets", true, path.str()))
      trims_.push_back(json_get_or<bool>(value, "add_prefix_space", true, path.str()));
    return;
  }
  if (type != "Sequence") path.refuse("post-processor '" + type + "' is not supported");
  if (depth >= kMaxSequenceDepth) path.refuse("Sequence is nested too deep");
  const auto list = value.find("processors");
  if (list == value.end() || !list->is_array()) path.child("processors").refuse("must be an array");
  for (std::size_t i = 0; i < list->size(); ++i) read((*list)[i], path.child("processors").child(i), depth + 1);
}

void PostProcessor::set_templates(Template single, Template pair, const FieldPath& path) {
  if (has_template_) path.refuse("a second post-processor that adds special tokens is not supported");
  has_template_ = true;
  single_ = std::move(single);
  pair_ = std::move(pair);
}

void PostProcessor::read_bert_like(const nlohmann::json& value, const FieldPath& path, bool is_roberta) {
  const auto special = [&](const char* name, std::int32_t type_id) {
    const FieldPath field = path.child(name);
    const auto it = value.find(name);
    if (it == value.end() || !it->is_array() || it->size() != 2 || !(*it)[0].is_string())
      field.refuse("must be [token, id]");
    return TemplatePiece{-1, type_id, {read_id((*it)[1], field)}, {(*it)[0].get<std::string>()}};
  };
  const std::int32_t second = is_roberta ? 0 : 1;  // RoBERTa has one token type
  Template pair{special("cls", 0), text_piece(0, 0), special("sep", 0)};
  Template single = pair;
  if (is_roberta) pair.push_back(special("sep", 0));
  pair.push_back(text_piece(1, second));
  pair.push_back(special("sep", second));
  set_templates(std::move(single), std::move(pair), path);
  if (is_roberta && json_get_or<bool>(value, "trim_offsets", true, path.str()))
    trims_.push_back(json_get_or<bool>(value, "add_prefix_space", true, path.str()));
}

void PostProcessor::read_template(const nlohmann::json& value, const FieldPath& path) {
  const auto special_tokens = value.find("special_tokens");
  const auto read_special = [&](const std::string& name, const FieldPath& at) {
    if (special_tokens == value.end() || !special_tokens->is_object() || !special_tokens->contains(name))
      at.refuse("special token '" + name + "' is not in special_tokens");
    const nlohmann::json& token = (*special_tokens)[name];
    TemplatePiece piece;
    if (!token.is_object() || !token.contains("ids") || !token["ids"].is_array() || !token.contains("tokens") ||
        !token["tokens"].is_array() || token["ids"].size() != token["tokens"].size())
      path.child("special_tokens").child(name).refuse("must hold 'ids' and 'tokens' of equal length");
    for (const nlohmann::json& id : token["ids"])
      piece.ids.push_back(read_id(id, path.child("special_tokens").child(name)));
    for (const nlohmann::json& text : token["tokens"]) {
      if (!text.is_string()) path.child("special_tokens").child(name).refuse("'tokens' must be strings");
      piece.tokens.push_back(text.get<std::string>());
    }
    return piece;
  };
  const auto read_list = [&](const char* name, int sequences) {
    const FieldPath field = path.child(name);
    if (!value.contains(name) || !value[name].is_array()) field.refuse("must be an array");
    Template result;
    int seen = 0;
    for (std::size_t i = 0; i < value[name].size(); ++i) {
      const nlohmann::json& item = value[name][i];
      const FieldPath at = field.child(i);
      if (!item.is_object() || item.size() != 1 || !item.begin()->is_object())
        at.refuse("must be {\"SpecialToken\": {...}} or {\"Sequence\": {...}}");
      const auto id = json_get<std::string>(*item.begin(), "id", at.str());
      TemplatePiece piece;
      if (item.begin().key() == "SpecialToken") {
        piece = read_special(id, at);
      } else if (item.begin().key() == "Sequence" && (id == "A" || (id == "B" && sequences == 2))) {
        piece.sequence = id == "A" ? 0 : 1;
        seen |= 1 << piece.sequence;
      } else {
        at.refuse("unknown piece '" + item.begin().key() + "' with id '" + id + "'");
      }
      const auto type_id = json_get_or<std::int64_t>(*item.begin(), "type_id", 0, at.str());
      if (type_id < 0 || type_id > INT32_MAX) at.child("type_id").refuse("must not be negative");
      piece.type_id = static_cast<std::int32_t>(type_id);
      result.push_back(std::move(piece));
    }
    if (seen != (1 << sequences) - 1) field.refuse("must use every sequence");
    return result;
  };
  set_templates(read_list("single", 1), read_list("pair", 2), path);
}

std::int64_t PostProcessor::added_tokens(bool is_pair) const {
  std::size_t count = 0;
  for (const TemplatePiece& piece : special_template(is_pair)) count += piece.ids.size();
  return static_cast<std::int64_t>(count);
}

Encoding PostProcessor::process(std::vector<Encoding>&& parts, const EncodeOptions& options) const {
  for (Encoding& part : parts)
    for (const bool add_prefix_space : trims_) trim_offsets(part, add_prefix_space);
  Encoding result;
  for (const TemplatePiece& piece : special_template(parts.size() > 1)) {
    if (piece.sequence < 0) {
      if (!options.add_special_tokens) continue;
      result.ids.insert(result.ids.end(), piece.ids.begin(), piece.ids.end());
      if (options.want_details) {
        result.tokens.insert(result.tokens.end(), piece.tokens.begin(), piece.tokens.end());
        result.offsets.insert(result.offsets.end(), piece.ids.size(), {0, 0});
      }
    } else {
      const Encoding& part = parts[static_cast<std::size_t>(piece.sequence)];
      result.ids.insert(result.ids.end(), part.ids.begin(), part.ids.end());
      result.tokens.insert(result.tokens.end(), part.tokens.begin(), part.tokens.end());
      result.offsets.insert(result.offsets.end(), part.offsets.begin(), part.offsets.end());
    }
    result.type_ids.resize(result.ids.size(), piece.type_id);
  }
  return result;
}

}  // namespace shardtune
