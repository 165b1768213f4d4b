#pragma once
// UTF-8 and the character classes that Hugging Face's tokenizers use. All functions are pure.
#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>

namespace shardtune::unicode {

// Bytes of the UTF-8 sequence that begins with `lead`. The text must be valid.
inline std::size_t sequence_length(char lead) {
  const auto byte = static_cast<unsigned char>(lead);
  return byte < 0x80 ? 1 : byte < 0xE0 ? 2 : byte < 0xF0 ? 3 : 4;
}
// Reads the code point at `at` of valid UTF-8 and moves `at` behind it.
inline char32_t decode(std::string_view text, std::size_t& at) {
  const auto byte = [&](std::size_t i) { return static_cast<char32_t>(static_cast<unsigned char>(text[at + i])); };
  const char32_t lead = byte(0);
  char32_t c = lead;
  const std::size_t length = sequence_length(text[at]);
  if (length == 2) c = (lead & 0x1F) << 6 | (byte(1) & 0x3F);
  if (length == 3) c = (lead & 0x0F) << 12 | (byte(1) & 0x3F) << 6 | (byte(2) & 0x3F);
  if (length == 4) c = (lead & 0x07) << 18 | (byte(1) & 0x3F) << 12 | (byte(2) & 0x3F) << 6 | (byte(3) & 0x3F);
  at += length;
  return c;
}
// The code point that ends before `at` (at > 0); moves `at` to its first byte.
char32_t decode_before(std::string_view text, std::size_t& at);
void append(std::string& out, char32_t c);

bool is_ascii(std::string_view text);
std::size_t count_code_points(std::string_view text);

bool is_whitespace(char32_t c);  // White_Space

// Classes as the tokenizers library has them: frozen at the Unicode versions of its crates, see unicode_tables.cpp.
bool is_removed_by_clean_text(char32_t c);  // NUL, U+FFFD and most of Cc, Cf, Co
bool is_nonspacing_mark(char32_t c);        // BertNormalizer's accents
bool is_punctuation(char32_t c);            // ASCII punctuation and P*
bool is_numeric(char32_t c);                // N*
bool is_combining_mark(char32_t c);         // StripAccents; anything else has combining class 0 in normalisation
bool is_cjk(char32_t c);                    // BertNormalizer's "Chinese characters"
bool has_compatibility_decomposition_disabled(char32_t c);

// Full lower-case mapping; only U+0130 gives two code points, the second comes back in `second` (0 otherwise).
char32_t lowercase(char32_t c, char32_t& second);

struct CodePointRange {
  char32_t first, last;
};
// What Unicode 16 added to \p{L}, \p{N} and \w since the Unicode version of the regular expression library.
std::span<const CodePointRange> added_letters();
std::span<const CodePointRange> added_numbers();
std::span<const CodePointRange> added_word_characters();

}  // namespace shardtune::unicode
