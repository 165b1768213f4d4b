// BertNormalizer: drop controls, spaces around CJK characters, NFD without accents, lower case; in that order.
#include <utility>

#include "data/normalizer.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

// Below this code point every decomposition is one base letter and accents, so a text of such characters needs no look
// at neighbours. Latin-1, Latin Extended-A and -B.
constexpr char32_t kFirstCombining = 0x300;

class BertNormalizer final : public Normalizer {
 public:
  explicit BertNormalizer(const BertNormalizerOptions& options) : options_(options) {
    for (char32_t c = 0; c < kFirstCombining; ++c) {
      base_[c] = c;
      if (!options_.strip_accents) continue;
      const std::vector<AlignedChar> decomposed = normalize({{c, {}}}, NormalForm::nfd, 0);
      base_[c] = decomposed.front().c;
    }
  }

  Piece apply(const Piece& piece, TextArena& arena) const override {
    TextBuilder out(piece);
    for (std::size_t at = 0; at < piece.text.size();) {
      const ByteRange from = out.tracked ? piece.align[at] : ByteRange{};
      const char32_t c = unicode::decode(piece.text, at);
      if (options_.strip_accents && !is_independent(c)) return apply_stepwise(piece, arena);
      add(out, c, from);
    }
    return arena.store(piece, std::move(out.text), std::move(out.align));
  }

 private:
  // Decomposes to a base letter at most, whatever stands beside it.
  static bool is_independent(char32_t c) {
    return c < kFirstCombining || (c >= 0x3400 && c <= 0x9FFF) || (c >= 0x2010 && c <= 0x2027) ||
           (c >= 0x3001 && c <= 0x3029) || (c >= 0xFF01 && c <= 0xFF5E) || (c >= 0x410 && c <= 0x418) ||
           (c >= 0x41A && c <= 0x438) || (c >= 0x43A && c <= 0x44F);
  }
  // The character as clean_text leaves it; false: gone.
  bool clean(char32_t& c) const {
    if (!options_.clean_text) return true;
    if (c == '\t' || c == '\n' || c == '\r') {
      c = ' ';
      return true;
    }
    if (unicode::is_removed_by_clean_text(c)) return false;
    if (unicode::is_whitespace(c)) c = ' ';
    return true;
  }

  void add(TextBuilder& out, char32_t c, const ByteRange& from) const {
    if (c >= 0x20 && c < 0x7F) {
      out.text += static_cast<char>(options_.lowercase && c >= 'A' && c <= 'Z' ? c + 32 : c);
      if (out.tracked) out.align.push_back(from);
      return;
    }
    if (!clean(c)) return;
    const bool spaced = options_.handle_cjk && unicode::is_cjk(c);
    if (spaced) out.add(U' ', from);
    if (c < kFirstCombining) c = base_[c];
    char32_t second = 0;
    if (options_.lowercase) c = unicode::lowercase(c, second);
    out.add(c, from);
    if (second != 0) out.add(second, from);
    if (spaced) out.add(U' ', from);
  }

  // Character order matters: marks are sorted by NFD before they are dropped.
  Piece apply_stepwise(const Piece& piece, TextArena& arena) const {
    std::vector<AlignedChar> spaced;
    for (AlignedChar c : to_chars(piece)) {
      if (!clean(c.c)) continue;
      const bool cjk = options_.handle_cjk && unicode::is_cjk(c.c);
      if (cjk) spaced.push_back({U' ', c.from});
      spaced.push_back(c);
      if (cjk) spaced.push_back({U' ', c.from});
    }
    std::vector<AlignedChar> result;
    for (const AlignedChar& c : normalize(spaced, NormalForm::nfd, piece.origin)) {
      if (unicode::is_nonspacing_mark(c.c)) continue;
      char32_t second = 0;
      result.push_back({options_.lowercase ? unicode::lowercase(c.c, second) : c.c, c.from});
      if (second != 0) result.push_back({second, c.from});
    }
    return from_chars(piece, result, arena);
  }

  BertNormalizerOptions options_;
  char32_t base_[kFirstCombining];
};

}  // namespace

std::unique_ptr<Normalizer> make_bert_normalizer(const BertNormalizerOptions& options) {
  return std::make_unique<BertNormalizer>(options);
}

}  // namespace shardtune
