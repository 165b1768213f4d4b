#include "data/tokenizer.hpp"

#include <algorithm>
#include <charconv>
#include <utility>

#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "core/error.hpp"
#include "core/file.hpp"
#include "core/json.hpp"
#include "data/added_tokens.hpp"
#include "data/normalizer.hpp"
#include "data/post_processor.hpp"
#include "data/pre_tokenizer.hpp"
#include "data/subword_model.hpp"
#include "data/tokenizer_json.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

constexpr std::size_t kMaxFileBytes = std::size_t{256} << 20;

// Code point index of each byte of a text, as offsets are reported.
class OffsetConverter {
 public:
  explicit OffsetConverter(std::string_view text) {
    if (unicode::is_ascii(text)) return;
    index_.reserve(text.size());
    std::int32_t count = -1;
    for (const char byte : text) {
      if ((static_cast<unsigned char>(byte) & 0xC0) != 0x80) ++count;
      index_.push_back(count);
    }
  }
  std::pair<std::int32_t, std::int32_t> operator()(const ByteRange& bytes) const {
    const auto begin = static_cast<std::size_t>(bytes.begin), end = static_cast<std::size_t>(bytes.end);
    if (begin >= index_.size()) return {bytes.begin, bytes.end};
    if (end < index_.size()) return {index_[begin], index_[end]};
    return {index_[begin], index_[std::min(end, index_.size()) - 1] + 1};
  }

 private:
  std::vector<std::int32_t> index_;  // empty: ASCII, where both are the same
};

struct Parts {
  std::unique_ptr<Normalizer> normalizer;
  PreTokenizerPlan pre_tokenizer;
  std::unique_ptr<SubwordModel> model;
  std::unique_ptr<AddedTokens> added;
  PostProcessor post_processor;
  bool truncates_left = false;
};

class JsonTokenizer final : public Tokenizer {
 public:
  explicit JsonTokenizer(Parts parts) : parts_(std::move(parts)) {}

  Encoding encode(std::string_view text, std::optional<std::string_view> pair,
                  const EncodeOptions& options) const override {
    std::vector<Encoding> encodings;
    encodings.push_back(encode_text(text, options.want_details));
    if (pair) encodings.push_back(encode_text(*pair, options.want_details));
    truncate(encodings, options);
    return parts_.post_processor.process(std::move(encodings), options);
  }
  std::int64_t vocab_size() const override {
    return static_cast<std::int64_t>(vocabulary().size() + parts_.added->count_beyond(vocabulary()));
  }
  std::optional<std::int32_t> token_to_id(std::string_view token) const override {
    if (const AddedToken* added = parts_.added->find(token); added != nullptr) return added->id;
    const std::int32_t id = vocabulary().find(token);
    return id < 0 ? std::nullopt : std::optional(id);
  }
  std::string id_to_token(std::int32_t id) const override {
    if (const AddedToken* added = parts_.added->find(id); added != nullptr) return added->content;
    return std::string(vocabulary().token(id));
  }

 private:
  const Vocabulary& vocabulary() const { return parts_.model->vocabulary(); }

  Encoding encode_text(std::string_view text, bool want_details) const {
    if (text.size() > INT32_MAX)
      fail(ErrorKind::data, fmt::format("a text of {} bytes is longer than a tokenizer takes (2 GiB)", text.size()));
    TextArena arena;
    RegexScratch regex;
    std::vector<Piece> pieces{arena.begin(text, want_details || parts_.pre_tokenizer.needs_alignment)};
    parts_.added->split(pieces, false);
    if (parts_.normalizer != nullptr)
      for (Piece& piece : pieces)
        if (piece.added_id < 0) piece = parts_.normalizer->apply(piece, arena);
    parts_.added->split(pieces, true);
    SplitScratch scratch{arena, regex, {}};
    if (parts_.pre_tokenizer.pre_tokenizer != nullptr) parts_.pre_tokenizer.pre_tokenizer->apply(pieces, scratch);

    Encoding encoding;
    const OffsetConverter converter(want_details ? text : std::string_view{});
    ModelScratch model_scratch;
    std::vector<WordToken> tokens;
    for (const Piece& piece : pieces) {
      tokens.clear();
      if (piece.added_id >= 0)
        tokens.push_back({piece.added_id, static_cast<std::uint32_t>(piece.text.size())});
      else
        parts_.model->tokenize(piece.text, model_scratch, tokens);
      for (const WordToken& token : tokens) encoding.ids.push_back(token.id);
      if (want_details) add_details(piece, tokens, converter, encoding);
    }
    return encoding;
  }

  void add_details(const Piece& piece, const std::vector<WordToken>& tokens, const OffsetConverter& converter,
                   Encoding& encoding) const {
    std::size_t begin = 0;
    for (const WordToken& token : tokens) {
      const std::size_t end = std::min(begin + token.length, piece.text.size());
      encoding.tokens.emplace_back(piece.added_id >= 0 ? piece.text : vocabulary().token(token.id));
      ByteRange from{piece.origin, piece.origin};
      if (begin < end) from = {piece.align[begin].begin, piece.align[end - 1].end};
      encoding.offsets.push_back(converter(from));
      begin = end;
    }
  }

  void truncate(std::vector<Encoding>& encodings, const EncodeOptions& options) const {
    if (options.max_length <= 0) return;
    const std::int64_t special =
        options.add_special_tokens ? parts_.post_processor.added_tokens(encodings.size() > 1) : 0;
    const std::int64_t room = options.max_length - special;
    if (room < 0)
      fail(ErrorKind::config, fmt::format("a maximum length of {} tokens has no room for the {} special tokens of this "
                                          "tokenizer; give a larger one",
                                          options.max_length, special));
    const auto first = static_cast<std::int64_t>(encodings[0].ids.size());
    if (encodings.size() == 1) {
      cut(encodings[0], std::min(first, room));
      return;
    }
    const auto second = static_cast<std::int64_t>(encodings[1].ids.size());
    if (first + second <= room) return;
    // Longest first: the shorter keeps all it can, both get half where neither fits.
    std::int64_t shorter = std::min(first, second);
    std::int64_t longer = shorter > room ? shorter : std::max(shorter, room - shorter);
    if (shorter + longer > room) {
      shorter = room / 2;
      longer = shorter + room % 2;
    }
    cut(encodings[0], first > second ? longer : shorter);
    cut(encodings[1], first > second ? shorter : longer);
  }

  void cut(Encoding& encoding, std::int64_t length) const {
    const auto keep = [&](auto& values) {
      if (static_cast<std::int64_t>(values.size()) <= length) return;
      const auto extra = static_cast<std::int64_t>(values.size()) - length;
      if (parts_.truncates_left)
        values.erase(values.begin(), values.begin() + extra);
      else
        values.erase(values.end() - extra, values.end());
    };
    keep(encoding.ids);
    keep(encoding.tokens);
    keep(encoding.offsets);
  }

  Parts parts_;
};

// Files written before the models named themselves.
std::string model_type(const TokenizerJson& file, const FieldPath& path) {
  const nlohmann::json& model = file.rest.at("model");
  if (model.contains("type")) return json_get<std::string>(model, "type", path.str());
  if (model.contains("merges")) return "BPE";
  if (!file.vocab.empty() && file.vocab.front() == '[') return "Unigram";
  if (model.contains("continuing_subword_prefix") || model.contains("max_input_chars_per_word")) return "WordPiece";
  return "WordLevel";
}

std::unique_ptr<SubwordModel> make_model(const TokenizerJson& file, const FieldPath& path, bool byte_level) {
  const std::string type = model_type(file, path);
  if (type != "WordPiece" && type != "BPE")
    path.refuse("tokenizer model '" + type + "' is not supported yet (supported: WordPiece, BPE)");
  if (file.vocab.empty()) path.child("vocab").refuse("is missing");
  if (type == "WordPiece" && byte_level)
    path.refuse("WordPiece after a ByteLevel pre-tokenizer is not supported (BPE is)");
  return type == "BPE" ? make_bpe(file, path, byte_level) : make_wordpiece(file, path);
}

void check_special_ids(const Parts& parts, const FieldPath& path) {
  for (const bool is_pair : {false, true})
    for (const TemplatePiece& piece : parts.post_processor.special_template(is_pair))
      for (const std::int32_t id : piece.ids)
        if (!parts.model->vocabulary().has_id(id) && parts.added->find(id) == nullptr)
          path.refuse(fmt::format("special token id {} is neither in the vocabulary nor an added token", id));
}

// Tokens that transformers adds on top of tokenizer.json, and the side that truncation cuts.
void read_config(const std::filesystem::path& file, std::vector<AddedToken>& tokens, bool& truncates_left) {
  const nlohmann::json config = read_json_file(file);
  const FieldPath path{file.string(), ""};
  const auto side = json_get_or<std::string>(config, "truncation_side", "right", path.str());
  if (side != "left" && side != "right")
    path.child("truncation_side").refuse("must be left or right, got '" + side + "'");
  truncates_left = side == "left";
  const auto decoder = config.find("added_tokens_decoder");
  if (decoder == config.end() || !decoder->is_object()) return;
  nlohmann::json list = nlohmann::json::array();
  for (const auto& [id, token] : decoder->items()) {
    std::int64_t number = -1;
    const auto [end, error] = std::from_chars(id.data(), id.data() + id.size(), number);
    if (error != std::errc{} || end != id.data() + id.size() || !token.is_object())
      path.child("added_tokens_decoder").refuse("'" + id + "' must be an id with an object");
    list.push_back(token);
    list.back()["id"] = number;
  }
  for (AddedToken& token : read_added_tokens(list, path.child("added_tokens_decoder"))) {
    const bool known =
        std::any_of(tokens.begin(), tokens.end(), [&](const AddedToken& t) { return t.content == token.content; });
    if (!known) tokens.push_back(std::move(token));
  }
}

}  // namespace

std::unique_ptr<Tokenizer> load_tokenizer(const std::filesystem::path& model_dir) {
  const std::filesystem::path file = model_dir / "tokenizer.json";
  if (!std::filesystem::exists(file))
    fail(ErrorKind::data, fmt::format("{}: there is no tokenizer.json; a model directory needs one (save the tokenizer "
                                      "with save_pretrained of a fast tokenizer)",
                                      file.string()));
  const FieldPath path{file.string(), ""};
  const std::string text = read_file(file, kMaxFileBytes);
  const TokenizerJson json = split_tokenizer_json(text, path);
  const auto section = [&](const char* name) {
    const auto it = json.rest.find(name);
    return it == json.rest.end() ? nlohmann::json() : *it;
  };
  if (!section("model").is_object()) path.child("model").refuse("must be an object");

  Parts parts;
  parts.normalizer = make_normalizer(section("normalizer"), path.child("normalizer"));
  parts.pre_tokenizer = make_pre_tokenizer(section("pre_tokenizer"), path.child("pre_tokenizer"));
  parts.model = make_model(json, path.child("model"), parts.pre_tokenizer.byte_level);
  std::vector<AddedToken> tokens = read_added_tokens(section("added_tokens"), path.child("added_tokens"));
  if (std::filesystem::exists(model_dir / "tokenizer_config.json"))
    read_config(model_dir / "tokenizer_config.json", tokens, parts.truncates_left);
  parts.added = std::make_unique<AddedTokens>(std::move(tokens), parts.model->vocabulary(), parts.normalizer.get(),
                                              path.child("added_tokens"));
  parts.post_processor = PostProcessor(section("post_processor"), path.child("post_processor"));
  check_special_ids(parts, path.child("post_processor"));
  return std::make_unique<JsonTokenizer>(std::move(parts));
}

CompanionFiles tokenizer_files(const std::filesystem::path& model_dir) {
  CompanionFiles files;
  for (const char* name : kTokenizerFiles)
    if (const std::filesystem::path file = model_dir / name; std::filesystem::is_regular_file(file))
      files.emplace_back(name, read_file(file, kMaxFileBytes));
  return files;
}

}  // namespace shardtune
