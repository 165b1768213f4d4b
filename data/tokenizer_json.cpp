#include "data/tokenizer_json.hpp"

#include <algorithm>
#include <charconv>
#include <cstring>

#include <fmt/format.h>

#include "core/json.hpp"
#include "data/unicode.hpp"
#include "data/utf8.hpp"

namespace shardtune {
namespace {

constexpr int kMaxDepth = 64;

// A cursor over JSON text. Strings come back as views of the text where they hold no escape.
class Scanner {
 public:
  Scanner(std::string_view text, const FieldPath& path) : text_(text), path_(path) {}

  std::size_t position() const { return at_; }
  [[noreturn]] void refuse(const std::string& what) const {
    path_.refuse(fmt::format("{} at byte {} of the section", what, at_));
  }
  char peek() {
    while (at_ < text_.size() && (text_[at_] == ' ' || text_[at_] == '\n' || text_[at_] == '\r' || text_[at_] == '\t'))
      ++at_;
    return at_ < text_.size() ? text_[at_] : '\0';
  }
  bool consume(char c) {
    if (peek() != c) return false;
    ++at_;
    return true;
  }
  void expect(char c) {
    if (!consume(c)) refuse(fmt::format("expected '{}'", c));
  }
  void expect_end() {
    if (peek() != '\0' || at_ < text_.size()) refuse("unexpected text after the end");
  }

  std::string_view read_string(std::string& scratch) {
    expect('"');
    const std::size_t begin = at_;
    while (at_ < text_.size() && text_[at_] != '"' && text_[at_] != '\\' &&
           static_cast<unsigned char>(text_[at_]) >= 0x20)
      ++at_;
    if (at_ < text_.size() && text_[at_] == '"') return text_.substr(begin, at_++ - begin);
    scratch.assign(text_.substr(begin, at_ - begin));
    while (at_ < text_.size() && text_[at_] != '"') {
      if (static_cast<unsigned char>(text_[at_]) < 0x20) refuse("control character in a string");
      if (text_[at_] == '\\')
        read_escape(scratch);
      else
        scratch += text_[at_++];
    }
    expect('"');
    return scratch;
  }

  std::int64_t read_integer() {
    peek();
    std::int64_t value = 0;
    const char* const end = text_.data() + text_.size();
    const auto [after, error] = std::from_chars(text_.data() + at_, end, value);
    const bool is_real = after < end && (*after == '.' || *after == 'e' || *after == 'E');
    if (error != std::errc{} || is_real) refuse("expected an integer id");
    at_ = static_cast<std::size_t>(after - text_.data());
    return value;
  }

  // Moves behind one value without looking into it further than brackets and strings.
  std::string_view skip_value() {
    peek();
    const std::size_t begin = at_;
    int depth = 0;
    do {
      const char c = peek();
      if (at_ >= text_.size()) refuse("unexpected end");
      if (c == '"') {
        skip_string();
      } else if (c == '{' || c == '[') {
        if (++depth > kMaxDepth) refuse(fmt::format("JSON is nested deeper than {}", kMaxDepth));
        ++at_;
      } else if (c == '}' || c == ']') {
        if (--depth < 0) refuse("unexpected bracket");
        ++at_;
      } else if (c == ',' || c == ':') {
        if (depth == 0) refuse("expected a value");
        ++at_;
      } else {
        while (at_ < text_.size() && std::strchr(",:]}[{\" \n\r\t", text_[at_]) == nullptr) ++at_;
        if (at_ < text_.size() && text_[at_] == '\0') refuse("NUL byte");
      }
    } while (depth > 0);
    return text_.substr(begin, at_ - begin);
  }

 private:
  void skip_string() {
    ++at_;
    while (true) {
      const void* const quote = at_ < text_.size() ? std::memchr(text_.data() + at_, '"', text_.size() - at_) : nullptr;
      if (quote == nullptr) refuse("string without an end");
      const auto end = static_cast<std::size_t>(static_cast<const char*>(quote) - text_.data());
      std::size_t backslashes = 0;
      while (end - backslashes > at_ && text_[end - backslashes - 1] == '\\') ++backslashes;
      at_ = end + 1;
      if (backslashes % 2 == 0) return;
    }
  }

  std::uint32_t read_hex4() {
    std::uint32_t value = 0;
    if (at_ + 4 > text_.size()) refuse("unexpected end in an escape");
    const char* const begin = text_.data() + at_;
    const auto [after, error] = std::from_chars(begin, begin + 4, value, 16);
    if (error != std::errc{} || after != begin + 4) refuse("bad \\u escape");
    at_ += 4;
    return value;
  }

  void read_escape(std::string& out) {
    constexpr std::string_view kNames = "\"\\/bfnrt";
    constexpr std::string_view kValues = "\"\\/\b\f\n\r\t";
    if (at_ + 1 >= text_.size()) refuse("unexpected end in an escape");
    const char name = text_[at_ + 1];
    at_ += 2;
    if (name != 'u') {
      const std::size_t index = kNames.find(name);
      if (index == std::string_view::npos) refuse("unknown escape");
      out += kValues[index];
      return;
    }
    char32_t c = read_hex4();
    if (c >= 0xD800 && c < 0xDC00 && text_.substr(at_, 2) == "\\u") {
      at_ += 2;
      const std::uint32_t low = read_hex4();
      if (low < 0xDC00 || low > 0xDFFF) refuse("lone surrogate");
      c = 0x10000 + ((c - 0xD800) << 10) + (low - 0xDC00);
    }
    if (c >= 0xD800 && c <= 0xDFFF) refuse("lone surrogate");
    unicode::append(out, c);
  }

  std::string_view text_;
  const FieldPath& path_;
  std::size_t at_ = 0;
};

// Calls on_member(key) for each member with the scanner standing before its value.
template <class OnMember>
void for_each_member(Scanner& scanner, const OnMember& on_member) {
  std::string scratch;
  scanner.expect('{');
  if (scanner.consume('}')) return;
  do {
    const std::string_view key = scanner.read_string(scratch);
    scanner.expect(':');
    on_member(key);
  } while (scanner.consume(','));
  scanner.expect('}');
}

}  // namespace

TokenizerJson split_tokenizer_json(std::string_view text, const FieldPath& path) {
  if (const std::size_t bad = valid_utf8_prefix(text); bad != text.size())
    path.refuse(fmt::format("invalid UTF-8 at byte {}", bad));
  if (text.substr(0, 3) == "\xEF\xBB\xBF") text.remove_prefix(3);
  TokenizerJson result;
  std::string rest;
  std::size_t copied = 0;
  Scanner scanner(text, path);
  const auto take = [&] {
    scanner.peek();
    const std::size_t begin = scanner.position();
    const std::string_view value = scanner.skip_value();
    rest.append(text.substr(copied, begin - copied)).append("null");
    copied = scanner.position();
    return value;
  };
  for_each_member(scanner, [&](std::string_view key) {
    if (key != "model" || scanner.peek() != '{') {
      scanner.skip_value();
      return;
    }
    for_each_member(scanner, [&](std::string_view field) {
      if (field == "vocab")
        result.vocab = take();
      else if (field == "merges")
        result.merges = take();
      else
        scanner.skip_value();
    });
  });
  scanner.expect_end();
  rest.append(text.substr(copied));
  result.rest = parse_json(rest, path.file);  // finds a second "vocab" as a duplicate key
  return result;
}

Vocabulary read_vocabulary(std::string_view object, const FieldPath& path) {
  Vocabulary vocabulary;
  // A token, its quotes, a colon, an id and a comma take at least ten bytes on average.
  vocabulary.reserve(object.size() / 16 + 16, object.size() / 2);
  Scanner scanner(object, path);
  if (scanner.peek() != '{') path.refuse("must be an object of token: id");
  // Holes are legal and some published files have a few; an id far beyond the file's size is an attack on memory.
  const auto id_limit = static_cast<std::int64_t>(object.size()) + 65536;
  for_each_member(scanner, [&](std::string_view token) {
    const std::int64_t id = scanner.read_integer();
    if (id < 0 || id >= id_limit)
      path.refuse(fmt::format("id {} of token '{}' is outside [0, {})", id, token, id_limit));
    switch (vocabulary.insert(token, static_cast<std::int32_t>(id))) {
      case Vocabulary::Insert::added: break;
      case Vocabulary::Insert::duplicate_token: path.refuse(fmt::format("token '{}' appears twice", token));
      case Vocabulary::Insert::duplicate_id:
        path.refuse(fmt::format("id {} of token '{}' is taken already", id, token));
    }
  });
  scanner.expect_end();
  if (vocabulary.size() == 0) path.refuse("holds no tokens");
  return vocabulary;
}

void read_merges(std::string_view array, const FieldPath& path, const MergeHandler& handler) {
  Scanner scanner(array, path);
  std::string first_scratch, second_scratch;
  std::int32_t rank = 0;
  scanner.expect('[');
  if (!scanner.consume(']')) {
    do {
      if (scanner.consume('[')) {
        const std::string_view first = scanner.read_string(first_scratch);
        scanner.expect(',');
        const std::string_view second = scanner.read_string(second_scratch);
        scanner.expect(']');
        handler(rank++, first, second);
        continue;
      }
      const std::string_view line = scanner.read_string(first_scratch);
      if (rank == 0 && line.substr(0, 8) == "#version") continue;
      const std::size_t space = line.find(' ');
      if (space == std::string_view::npos || line.find(' ', space + 1) != std::string_view::npos)
        path.child(static_cast<std::size_t>(rank))
            .refuse(fmt::format("'{}' must be two tokens with one space between", line));
      handler(rank++, line.substr(0, space), line.substr(space + 1));
    } while (scanner.consume(','));
    scanner.expect(']');
  }
  scanner.expect_end();
}

}  // namespace shardtune
