#pragma once
// Text on its way from input to tokens, with the part of the original that each of its bytes came from: what Hugging
// Face's NormalizedString keeps, so that offsets are equal after any normalisation.
#include <cstddef>
#include <cstdint>
#include <deque>
#include <string>
#include <string_view>
#include <vector>

namespace shardtune {

struct ByteRange {
  std::int32_t begin = 0, end = 0;  // bytes of the original text
};

// A stretch of (normalised) text. Views storage of a TextArena or the caller's text.
struct Piece {
  std::string_view text;             // valid UTF-8
  const ByteRange* align = nullptr;  // one per byte of text; nullptr where offsets are not wanted
  std::int32_t added_id = -1;        // >= 0: an added token, never touched again
  std::int32_t origin = 0;           // where the piece began in the original when it was cut off

  Piece slice(std::size_t begin, std::size_t end) const {
    Piece part{text.substr(begin, end - begin), align == nullptr ? nullptr : align + begin, -1, 0};
    part.origin = align != nullptr && begin < end ? align[begin].begin : origin + static_cast<std::int32_t>(begin);
    return part;
  }
};

// Owns what pieces view during one encode().
class TextArena {
 public:
  // Moves the storage in and returns the piece with its text replaced; align stays nullptr for untracked pieces.
  Piece store(const Piece& old, std::string text, std::vector<ByteRange> align);
  // The whole input as one piece, with identity alignment when tracked.
  Piece begin(std::string_view input, bool tracked);

 private:
  std::deque<std::string> texts_;
  std::deque<std::vector<ByteRange>> aligns_;
};

// Text under construction.
struct TextBuilder {
  explicit TextBuilder(const Piece& source) : tracked(source.align != nullptr) { text.reserve(source.text.size() + 8); }
  void add(char32_t c, const ByteRange& from);
  void add(std::string_view bytes, const ByteRange& from);  // all of them from one place
  void copy(const Piece& source, std::size_t begin, std::size_t end);

  bool tracked;
  std::string text;
  std::vector<ByteRange> align;
};

// The same text as code points, for normalisers that look at characters and their neighbours.
struct AlignedChar {
  char32_t c;
  ByteRange from;
};
// One character of a transformation's result. change > 0: inserted; 0: replaces one character; -n: replaces one and
// removes n more.
struct ChangedChar {
  char32_t c;
  int change;
};
std::vector<AlignedChar> to_chars(const Piece& piece);
Piece from_chars(const Piece& old, const std::vector<AlignedChar>& chars, TextArena& arena);
// An inserted character comes from where the character before it came from.
std::vector<AlignedChar> transform(const std::vector<AlignedChar>& old, const std::vector<ChangedChar>& changed,
                                   std::int32_t origin);
// Puts `prefix` before the first character, from where that came. An empty piece stays empty.
Piece prepend(const Piece& piece, std::string_view prefix, TextArena& arena);

}  // namespace shardtune
