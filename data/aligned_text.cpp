#include "data/aligned_text.hpp"

#include <utility>

#include "data/unicode.hpp"

namespace shardtune {

Piece TextArena::store(const Piece& old, std::string text, std::vector<ByteRange> align) {
  texts_.push_back(std::move(text));
  Piece piece = old;
  piece.text = texts_.back();
  if (old.align != nullptr) {
    align.emplace_back();  // an empty text still needs an address that says "tracked"
    aligns_.push_back(std::move(align));
    piece.align = aligns_.back().data();
  }
  return piece;
}

Piece TextArena::begin(std::string_view input, bool tracked) {
  Piece piece{input, nullptr, -1, 0};
  if (!tracked) return piece;
  std::vector<ByteRange> align;
  align.reserve(input.size() + 1);
  for (std::size_t at = 0; at < input.size();) {
    const std::size_t length = unicode::sequence_length(input[at]);
    const ByteRange range{static_cast<std::int32_t>(at), static_cast<std::int32_t>(at + length)};
    align.insert(align.end(), length, range);
    at += length;
  }
  align.emplace_back();
  aligns_.push_back(std::move(align));
  piece.align = aligns_.back().data();
  return piece;
}

void TextBuilder::add(char32_t c, const ByteRange& from) {
  const std::size_t before = text.size();
  unicode::append(text, c);
  if (tracked) align.insert(align.end(), text.size() - before, from);
}

void TextBuilder::add(std::string_view bytes, const ByteRange& from) {
  text += bytes;
  if (tracked) align.insert(align.end(), bytes.size(), from);
}

void TextBuilder::copy(const Piece& source, std::size_t begin, std::size_t end) {
  text += source.text.substr(begin, end - begin);
  if (tracked) align.insert(align.end(), source.align + begin, source.align + end);
}

std::vector<AlignedChar> to_chars(const Piece& piece) {
  std::vector<AlignedChar> chars;
  chars.reserve(piece.text.size());
  for (std::size_t at = 0; at < piece.text.size();) {
    const ByteRange from = piece.align == nullptr ? ByteRange{} : piece.align[at];
    chars.push_back({unicode::decode(piece.text, at), from});
  }
  return chars;
}

Piece from_chars(const Piece& old, const std::vector<AlignedChar>& chars, TextArena& arena) {
  TextBuilder builder(old);
  for (const AlignedChar& c : chars) builder.add(c.c, c.from);
  return arena.store(old, std::move(builder.text), std::move(builder.align));
}

std::vector<AlignedChar> transform(const std::vector<AlignedChar>& old, const std::vector<ChangedChar>& changed,
                                   std::int32_t origin) {
  std::vector<AlignedChar> result;
  result.reserve(changed.size());
  std::size_t next = 0;
  for (const ChangedChar& changed_char : changed) {
    ByteRange from{origin, origin};
    if (changed_char.change > 0) {
      if (next > 0) from = old[next - 1].from;
    } else {
      from = old[next].from;
      next += static_cast<std::size_t>(1 - changed_char.change);
    }
    result.push_back({changed_char.c, from});
  }
  return result;
}

Piece prepend(const Piece& piece, std::string_view prefix, TextArena& arena) {
  if (piece.text.empty()) return piece;
  TextBuilder builder(piece);
  builder.add(prefix, piece.align == nullptr ? ByteRange{} : piece.align[0]);
  builder.copy(piece, 0, piece.text.size());
  return arena.store(piece, std::move(builder.text), std::move(builder.align));
}

}  // namespace shardtune
