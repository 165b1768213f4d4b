#include <algorithm>
#include <string>
#include <utility>

#include <fmt/format.h>

#include "core/json.hpp"
#include "data/subword_model.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

class WordPiece final : public SubwordModel {
 public:
  struct Options {
    std::string prefix;
    std::size_t max_chars = 100;
    std::int32_t unknown = 0;
  };
  WordPiece(Vocabulary vocabulary, Options options) : vocabulary_(std::move(vocabulary)), options_(std::move(options)) {
    prefix_hash_.add(options_.prefix);
  }

  void tokenize(std::string_view word, ModelScratch& scratch, std::vector<WordToken>& out) const override {
    const WordToken unknown{options_.unknown, static_cast<std::uint32_t>(word.size())};
    if (word.size() > options_.max_chars && unicode::count_code_points(word) > options_.max_chars) {
      out.push_back(unknown);
      return;
    }
    const std::size_t before = out.size();
    for (std::size_t start = 0; start < word.size();) {
      const WordToken token = longest_match(word, start, scratch);
      if (token.id < 0) {
        out.resize(before);
        out.push_back(unknown);
        return;
      }
      out.push_back(token);
      start += token.length;
    }
  }
  const Vocabulary& vocabulary() const override { return vocabulary_; }

 private:
  WordToken longest_match(std::string_view word, std::size_t start, ModelScratch& scratch) const {
    const std::string_view prefix = start == 0 ? std::string_view{} : options_.prefix;
    TokenHash hash = start == 0 ? TokenHash{} : prefix_hash_;
    const std::size_t longest = vocabulary_.longest_token() - std::min(prefix.size(), vocabulary_.longest_token());
    const std::string_view rest = word.substr(start, longest);
    scratch.hashes.clear();
    for (const char byte : rest) {
      hash.add(byte);
      scratch.hashes.push_back(hash.value());
    }
    for (std::size_t length = rest.size(); length > 0; --length) {
      const std::size_t end = start + length;
      if (end < word.size() && (static_cast<unsigned char>(word[end]) & 0xC0) == 0x80) continue;  // inside a character
      const std::int32_t id = vocabulary_.find(prefix, rest.substr(0, length), scratch.hashes[length - 1]);
      if (id >= 0) return {id, static_cast<std::uint32_t>(length)};
    }
    return {-1, 0};
  }

  Vocabulary vocabulary_;
  Options options_;
  TokenHash prefix_hash_;
};

}  // namespace

std::unique_ptr<SubwordModel> make_wordpiece(const TokenizerJson& file, const FieldPath& path) {
  const nlohmann::json& model = file.rest.at("model");
  WordPiece::Options options;
  options.prefix = json_get_or<std::string>(model, "continuing_subword_prefix", "##", path.str());
  const auto max_chars = json_get_or<std::int64_t>(model, "max_input_chars_per_word", 100, path.str());
  if (max_chars < 0 || max_chars > 1'000'000)
    path.child("max_input_chars_per_word").refuse(fmt::format("must be in [0, 1000000], got {}", max_chars));
  options.max_chars = static_cast<std::size_t>(max_chars);
  Vocabulary vocabulary = read_vocabulary(file.vocab, path.child("vocab"));
  const auto unknown = json_get_or<std::string>(model, "unk_token", "[UNK]", path.str());
  options.unknown = vocabulary.find(unknown);
  if (options.unknown < 0) path.child("unk_token").refuse(fmt::format("'{}' is not in the vocabulary", unknown));
  return std::make_unique<WordPiece>(std::move(vocabulary), std::move(options));
}

}  // namespace shardtune
