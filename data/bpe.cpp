// Byte pair encoding, byte-level (GPT-2, Llama 3) and with byte fallback (Llama 2).
#include <array>
#include <atomic>
#include <string>
#include <utility>

#include <fmt/format.h>

#include "core/json.hpp"
#include "data/merge_table.hpp"
#include "data/subword_model.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

constexpr std::string_view kWordStart = "\xE2\x96\x81";  // U+2581, SentencePiece's space

// GPT-2 spells each byte as a printable character: itself, or one from U+0100 on.
std::array<char32_t, 256> byte_spelling() {
  std::array<char32_t, 256> spelling{};
  char32_t next = 0x100;
  for (std::size_t byte = 0; byte < 256; ++byte) {
    const bool printable = (byte >= 0x21 && byte <= 0x7E) || (byte >= 0xA1 && byte <= 0xAC) || byte >= 0xAE;
    spelling[byte] = printable ? static_cast<char32_t>(byte) : next++;
  }
  return spelling;
}

// The vocabulary again, with tokens as the bytes they stand for. Tokens that spell no bytes are left out.
Vocabulary spelled_out(const Vocabulary& vocabulary) {
  std::array<std::int16_t, 0x144> byte_of{};
  byte_of.fill(-1);
  const auto spelling = byte_spelling();
  for (std::size_t byte = 0; byte < 256; ++byte) byte_of[spelling[byte]] = static_cast<std::int16_t>(byte);
  Vocabulary result;
  result.reserve(vocabulary.id_limit(), vocabulary.id_limit() * 8);
  std::string bytes;
  for (std::size_t id = 0; id < vocabulary.id_limit(); ++id) {
    const std::string_view token = vocabulary.token(static_cast<std::int32_t>(id));
    bytes.clear();
    bool spells = !token.empty();
    for (std::size_t at = 0; at < token.size() && spells;) {
      const char32_t c = unicode::decode(token, at);
      spells = c < byte_of.size() && byte_of[c] >= 0;
      if (spells) bytes += static_cast<char>(byte_of[c]);
    }
    if (spells) result.insert(bytes, static_cast<std::int32_t>(id));
  }
  return result;
}

class Bpe final : public SubwordModel {
 public:
  struct Options {
    bool byte_level = false;
    bool byte_fallback = false;
    bool fuse_unknown = false;
    bool ignore_merges = false;
    bool splits_at_word_start = false;  // no token crosses from another character into U+2581
    std::int32_t unknown = -1;          // -1: unknown characters vanish, as in the library
  };

  Bpe(Vocabulary vocabulary, MergeTable merges, Options options)
      : vocabulary_(std::move(vocabulary)),
        merges_(std::move(merges)),
        options_(options),
        whole_(vocabulary_.id_limit()) {
    if (options_.byte_level) bytes_ = spelled_out(vocabulary_);
    for (std::size_t i = 0; i < 256; ++i) {
      const char byte = static_cast<char>(i);
      single_[i] = options_.byte_level || i < 0x80 ? words().find({&byte, 1}) : -1;
      fallback_[i] = options_.byte_fallback ? vocabulary_.find(fmt::format("<0x{:02X}>", i)) : -1;
    }
  }

  void tokenize(std::string_view word, ModelScratch& scratch, std::vector<WordToken>& out) const override {
    if (!options_.splits_at_word_start) return tokenize_word(word, scratch, out);
    std::size_t begin = 0;
    for (std::size_t at = word.find(kWordStart, 1); at != std::string_view::npos; at = word.find(kWordStart, at + 3)) {
      if (word.substr(0, at).ends_with(kWordStart)) continue;  // runs of word starts may merge
      tokenize_word(word.substr(begin, at - begin), scratch, out);
      begin = at;
    }
    tokenize_word(word.substr(begin), scratch, out);
  }
  const Vocabulary& vocabulary() const override { return vocabulary_; }

 private:
  // Whether merging the spelling of a token gives that token, learned when first asked.
  enum WholeState : std::uint8_t { unknown_state, whole_state, split_state };

  const Vocabulary& words() const { return options_.byte_level ? bytes_ : vocabulary_; }

  void tokenize_word(std::string_view word, ModelScratch& scratch, std::vector<WordToken>& out) const {
    const std::int32_t id = word.size() <= words().longest_token() ? words().find(word) : -1;
    const WordToken whole{id, static_cast<std::uint32_t>(word.size())};
    if (id >= 0) {
      std::atomic<std::uint8_t>& state = whole_[static_cast<std::size_t>(id)];
      if (options_.ignore_merges || state.load(std::memory_order_relaxed) == whole_state) {
        out.push_back(whole);
        return;
      }
      merge(word, scratch);
      const bool is_whole = scratch.symbols.size() == 1 && scratch.symbols[0].id == id;
      state.store(is_whole ? whole_state : split_state, std::memory_order_relaxed);
    } else {
      merge(word, scratch);
    }
    out.insert(out.end(), scratch.symbols.begin(), scratch.symbols.end());
  }

  void merge(std::string_view word, ModelScratch& scratch) const {
    scratch.symbols.clear();
    std::uint32_t pending = 0;  // bytes of unknown characters not yet written
    for (std::size_t at = 0; at < word.size();) {
      const std::size_t length = options_.byte_level ? 1 : unicode::sequence_length(word[at]);
      add_symbol(word.substr(at, length), pending, scratch.symbols);
      at += length;
    }
    if (pending > 0) scratch.symbols.push_back({options_.unknown, pending});
    merges_.apply(scratch);
  }

  void add_symbol(std::string_view symbol, std::uint32_t& pending, std::vector<WordToken>& symbols) const {
    const auto byte = static_cast<unsigned char>(symbol[0]);
    const std::int32_t id = symbol.size() == 1 ? single_[byte] : vocabulary_.find(symbol);
    const auto length = static_cast<std::uint32_t>(symbol.size());
    if (id >= 0) {
      if (pending > 0) symbols.push_back({options_.unknown, std::exchange(pending, 0)});
      symbols.push_back({id, length});
      return;
    }
    // Bytes go before an unknown character that still waits for its neighbours: the library's order.
    if (options_.byte_fallback && has_fallback(symbol)) {
      for (const char b : symbol) symbols.push_back({fallback_[static_cast<unsigned char>(b)], 1});
      return;
    }
    if (options_.unknown < 0) return;
    if (pending > 0 && !options_.fuse_unknown) symbols.push_back({options_.unknown, std::exchange(pending, 0)});
    pending += length;
  }
  bool has_fallback(std::string_view symbol) const {
    for (const char byte : symbol)
      if (fallback_[static_cast<unsigned char>(byte)] < 0) return false;
    return true;
  }

  Vocabulary vocabulary_;
  Vocabulary bytes_;  // byte-level: tokens as bytes
  MergeTable merges_;
  Options options_;
  std::array<std::int32_t, 256> single_{};                // one-byte symbols
  std::array<std::int32_t, 256> fallback_{};              // <0x00> to <0xFF>
  mutable std::vector<std::atomic<std::uint8_t>> whole_;  // by id; any thread would write the same value
};

// True when the token has U+2581 behind another character.
bool crosses_word_start(std::string_view token) {
  for (std::size_t at = token.find(kWordStart); at != std::string_view::npos; at = token.find(kWordStart, at + 3))
    if (at > 0 && !token.substr(0, at).ends_with(kWordStart)) return true;
  return false;
}

Bpe::Options read_options(const nlohmann::json& model, const Vocabulary& vocabulary, const FieldPath& path,
                          bool byte_level) {
  const std::string origin = path.str();
  for (const char* name : {"continuing_subword_prefix", "end_of_word_suffix"})
    if (!json_get_or<std::string>(model, name, "", origin).empty())
      path.child(name).refuse("a BPE with this is not supported yet; it must be null or empty");
  if (json_get_or<double>(model, "dropout", 0.0, origin) != 0.0)
    path.child("dropout").refuse("BPE dropout is not supported; it must be null");
  Bpe::Options options;
  options.byte_level = byte_level;
  options.byte_fallback = json_get_or<bool>(model, "byte_fallback", false, origin);
  options.fuse_unknown = json_get_or<bool>(model, "fuse_unk", false, origin);
  options.ignore_merges = json_get_or<bool>(model, "ignore_merges", false, origin);
  if (byte_level && options.byte_fallback)
    path.child("byte_fallback").refuse("is not supported together with ByteLevel");
  const auto unknown = json_get_or<std::string>(model, "unk_token", "", origin);
  if (!unknown.empty()) {
    options.unknown = vocabulary.find(unknown);
    if (options.unknown < 0) path.child("unk_token").refuse(fmt::format("'{}' is not in the vocabulary", unknown));
  }
  return options;
}

}  // namespace

std::unique_ptr<SubwordModel> make_bpe(const TokenizerJson& file, const FieldPath& path, bool byte_level) {
  Vocabulary vocabulary = read_vocabulary(file.vocab, path.child("vocab"));
  Bpe::Options options = read_options(file.rest.at("model"), vocabulary, path, byte_level);
  if (file.merges.empty()) path.child("merges").refuse("is missing");
  const FieldPath merges_path = path.child("merges");
  MergeTable merges(vocabulary.size());
  bool crosses = false;
  read_merges(file.merges, merges_path, [&](std::int32_t rank, std::string_view first, std::string_view second) {
    const auto refuse = [&](const std::string& missing) {
      merges_path.child(static_cast<std::size_t>(rank))
          .refuse(fmt::format("'{} {}': '{}' is not in the vocabulary", first, second, missing));
    };
    TokenHash hash;
    hash.add(first);
    const std::int32_t left = vocabulary.find(first, hash.value());
    hash.add(second);
    const std::int32_t right = vocabulary.find(second);
    const std::int32_t merged = vocabulary.find(first, second, hash.value());
    if (left < 0) refuse(std::string(first));
    if (right < 0) refuse(std::string(second));
    if (merged < 0) refuse(std::string(first) + std::string(second));
    merges.insert(left, right, {rank, merged});
    crosses = crosses || (!byte_level && crosses_word_start(vocabulary.token(merged)));
  });
  options.splits_at_word_start = !byte_level && !options.ignore_merges && !crosses && vocabulary.find(kWordStart) >= 0;
  return std::make_unique<Bpe>(std::move(vocabulary), std::move(merges), options);
}

}  // namespace shardtune
