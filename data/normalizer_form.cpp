// NFD, NFC, NFKD, NFKC over utf8proc's data. Own loops because each character must say what it replaced, which decides
// offsets; the composition follows Unicode Standard Annex 15.
#include <algorithm>
#include <array>
#include <optional>
#include <utility>

#include <utf8proc.h>

#include "data/normalizer.hpp"
#include "data/unicode.hpp"

namespace shardtune {
namespace {

int combining_class(char32_t c) {
  if (!unicode::is_combining_mark(c)) return 0;  // marks younger than the crate's Unicode 9 do not move there
  return utf8proc_get_property(static_cast<utf8proc_int32_t>(c))->combining_class;
}

bool is_younger_than_the_crate(char32_t c, bool compatibility) {
  return c == 0x11938 || (compatibility && unicode::has_compatibility_decomposition_disabled(c));
}

std::vector<ChangedChar> decompose(const std::vector<AlignedChar>& chars, bool compatibility) {
  std::vector<ChangedChar> out;
  out.reserve(chars.size());
  const auto options =
      static_cast<utf8proc_option_t>(UTF8PROC_DECOMPOSE | UTF8PROC_STABLE | (compatibility ? UTF8PROC_COMPAT : 0));
  std::array<utf8proc_int32_t, 32> buffer{};  // the longest decomposition (U+FDFA) has 18
  for (const AlignedChar& c : chars) {
    int boundary = 0;
    utf8proc_ssize_t count = 0;
    if (c.c >= 0x80 && !is_younger_than_the_crate(c.c, compatibility))
      count =
          utf8proc_decompose_char(static_cast<utf8proc_int32_t>(c.c), buffer.data(), buffer.size(), options, &boundary);
    if (count <= 0) {
      out.push_back({c.c, 0});
      continue;
    }
    for (utf8proc_ssize_t i = 0; i < count; ++i)
      out.push_back({static_cast<char32_t>(buffer[static_cast<std::size_t>(i)]), i == 0 ? 0 : 1});
  }
  // Canonical ordering: stable sort of each run of marks.
  for (auto run = out.begin(); run != out.end();) {
    if (combining_class(run->c) == 0) {
      ++run;
      continue;
    }
    const auto end = std::find_if(run, out.end(), [](const ChangedChar& c) { return combining_class(c.c) == 0; });
    std::stable_sort(run, end, [](const ChangedChar& a, const ChangedChar& b) {
      return combining_class(a.c) < combining_class(b.c);
    });
    run = end;
  }
  return out;
}

// The primary composite of two characters, 0 when there is none.
char32_t compose_pair(char32_t a, char32_t b) {
  if (b < 0x300) return 0;
  std::array<utf8proc_int32_t, 4> pair{static_cast<utf8proc_int32_t>(a), static_cast<utf8proc_int32_t>(b), 0, 0};
  const utf8proc_ssize_t length =
      utf8proc_normalize_utf32(pair.data(), 2, static_cast<utf8proc_option_t>(UTF8PROC_COMPOSE | UTF8PROC_STABLE));
  if (length != 1 || pair[0] == 0x11938) return 0;
  return static_cast<char32_t>(pair[0]);
}

std::vector<ChangedChar> compose(const std::vector<ChangedChar>& in) {
  std::vector<ChangedChar> out;
  out.reserve(in.size());
  std::optional<std::size_t> starter;  // index in out
  int last_class = -1;                 // class of the last mark kept after the starter, -1: none
  for (const ChangedChar& c : in) {
    const int own_class = combining_class(c.c);
    if (starter && last_class < own_class) {  // not blocked; also starter directly followed by a starter (-1 < 0)
      if (const char32_t composite = compose_pair(out[*starter].c, c.c); composite != 0) {
        out[*starter] = {composite, out[*starter].change + c.change - 1};
        continue;
      }
    }
    if (own_class == 0) {
      starter = out.size();
      last_class = -1;
    } else if (starter) {
      last_class = own_class;
    }
    out.push_back(c);
  }
  return out;
}

// Characters that NFC and NFKC leave alone whatever stands beside them (a conservative choice: everyday scripts).
bool is_inert(char32_t c, bool compatibility) {
  if (c < 0xA0) return true;
  if (compatibility) {
    return (c >= 0xC0 && c <= 0x131) || (c >= 0x400 && c <= 0x482) || (c >= 0x3041 && c <= 0x3096) ||
           (c >= 0x30A1 && c <= 0x30FE) || (c >= 0x3400 && c <= 0x9FFF) || (c >= 0xAC00 && c <= 0xD7A3);
  }
  return c < 0x300 || (c >= 0x400 && c <= 0x482) || (c >= 0x48A && c <= 0x52F) || (c >= 0x5D0 && c <= 0x5EA) ||
         (c >= 0x621 && c <= 0x64A) || (c >= 0x1E00 && c <= 0x1EFF) || (c >= 0x2002 && c <= 0x2125) ||
         (c >= 0x2190 && c <= 0x2328) || (c >= 0x3000 && c <= 0x3029) || (c >= 0x3041 && c <= 0x3096) ||
         (c >= 0x30A1 && c <= 0x30FE) || (c >= 0x3400 && c <= 0x9FFF) || (c >= 0xAC00 && c <= 0xD7A3) ||
         (c >= 0xFF01 && c <= 0xFFEE) || (c >= 0x1F000 && c <= 0x1FAFF);
}

class FormNormalizer final : public Normalizer {
 public:
  explicit FormNormalizer(NormalForm form) : form_(form) {}
  Piece apply(const Piece& piece, TextArena& arena) const override {
    if (unicode::is_ascii(piece.text)) return piece;
    if (form_ == NormalForm::nfc || form_ == NormalForm::nfkc) {
      bool inert = true;
      for (std::size_t at = 0; at < piece.text.size() && inert;)
        inert = is_inert(unicode::decode(piece.text, at), form_ == NormalForm::nfkc);
      if (inert) return piece;
    }
    return from_chars(piece, normalize(to_chars(piece), form_, piece.origin), arena);
  }

 private:
  NormalForm form_;
};

}  // namespace

std::vector<AlignedChar> normalize(const std::vector<AlignedChar>& chars, NormalForm form, std::int32_t origin) {
  std::vector<ChangedChar> changed = decompose(chars, form == NormalForm::nfkd || form == NormalForm::nfkc);
  if (form == NormalForm::nfc || form == NormalForm::nfkc) changed = compose(changed);
  return transform(chars, changed, origin);
}

std::unique_ptr<Normalizer> make_form_normalizer(NormalForm form) { return std::make_unique<FormNormalizer>(form); }

}  // namespace shardtune
