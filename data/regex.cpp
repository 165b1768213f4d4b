#define PCRE2_CODE_UNIT_WIDTH 8
#include "data/regex.hpp"

#include <cstdint>
#include <span>

#include <fmt/format.h>
#include <pcre2.h>

#include "data/unicode.hpp"

namespace shardtune {
namespace {

constexpr std::string_view kWhiteSpace =
    R"(\t-\r\x20\x{85}\x{A0}\x{1680}\x{2000}-\x{200A}\x{2028}\x{2029}\x{202F}\x{205F}\x{3000})";
constexpr std::size_t kFirstJitStack = std::size_t{32} << 10;
constexpr std::size_t kLargestJitStack = std::size_t{64} << 20;
constexpr std::uint32_t kMatchLimit = 50'000'000;
constexpr std::uint32_t kHeapLimitKiB = 256 << 10;
constexpr std::size_t kMaxPattern = 64 << 10;

std::string ranges(std::span<const unicode::CodePointRange> list) {
  std::string text;
  for (const auto& range : list)
    text += fmt::format("\\x{{{:X}}}-\\x{{{:X}}}", static_cast<std::uint32_t>(range.first),
                        static_cast<std::uint32_t>(range.last));
  return text;
}

// What stands in a class for an escape whose meaning differs between the engines; empty: none differs.
// `negated` tells of \S and \P{...}.
std::string class_body(std::string_view escape, bool& negated) {
  negated = escape[1] == 'S' || escape[1] == 'P';
  if (escape == "\\s" || escape == "\\S") return std::string(kWhiteSpace);
  if (escape == "\\h") return "0-9A-Fa-f";  // Oniguruma: a hexadecimal digit
  if (escape.size() > 2 && escape.substr(2) == "{L}") return "\\p{L}" + ranges(unicode::added_letters());
  if (escape.size() > 2 && escape.substr(2) == "{N}") return "\\p{N}" + ranges(unicode::added_numbers());
  return {};
}

// From Oniguruma's syntax to PCRE2's.
std::string translate(std::string_view pattern, const FieldPath& path) {
  std::string out;
  bool in_class = false;
  for (std::size_t at = 0; at < pattern.size();) {
    const char c = pattern[at];
    if (c == '\\' && at + 1 < pattern.size()) {
      std::size_t length = 1 + unicode::sequence_length(pattern[at + 1]);
      if ((pattern[at + 1] == 'p' || pattern[at + 1] == 'P') && at + 2 < pattern.size() && pattern[at + 2] == '{') {
        const std::size_t close = pattern.find('}', at);
        if (close == std::string_view::npos) path.refuse("\\p{ without }");
        length = close + 1 - at;
      }
      const std::string_view escape = pattern.substr(at, length);
      bool negated = false;
      const std::string body = class_body(escape, negated);
      if (body.empty() || (in_class && negated))
        out += escape;
      else if (in_class)
        out += body;
      else
        out += (negated ? "[^" : "[") + body + "]";
      at += length;
      continue;
    }
    if (in_class && (c == '[' || pattern.substr(at, 2) == "&&"))
      path.refuse("a character class within a character class is not supported");
    if (c == '[') {
      in_class = true;
      out += c;
      ++at;
      if (at < pattern.size() && pattern[at] == '^') out += pattern[at++];
      if (at < pattern.size() && pattern[at] == ']') path.refuse("an empty character class is not supported");
      continue;
    }
    if (c == ']') in_class = false;
    out += c;
    ++at;
  }
  return out;
}

std::string error_text(int code) {
  PCRE2_UCHAR buffer[256] = {};
  pcre2_get_error_message(code, buffer, sizeof buffer);
  return reinterpret_cast<const char*>(buffer);
}

}  // namespace

struct RegexScratch::Impl {
  ~Impl() {
    pcre2_match_data_free(data);
    pcre2_match_context_free(context);
    if (stack != nullptr) pcre2_jit_stack_free(stack);
  }
  pcre2_match_data* data = pcre2_match_data_create(1, nullptr);
  pcre2_match_context* context = pcre2_match_context_create(nullptr);
  pcre2_jit_stack* stack = nullptr;
};
RegexScratch::RegexScratch() = default;
RegexScratch::~RegexScratch() = default;

struct Regex::Impl {
  ~Impl() { pcre2_code_free(code); }
  pcre2_code* code = nullptr;
  std::string field;
};
Regex::~Regex() = default;
Regex::Regex(Regex&&) noexcept = default;

Regex::Regex(const std::string& pattern, const FieldPath& path) : impl_(std::make_unique<Impl>()) {
  if (pattern.size() > kMaxPattern) path.refuse(fmt::format("an expression of {} bytes is too long", pattern.size()));
  const std::string translated = translate(pattern, path);
  int error = 0;
  PCRE2_SIZE where = 0;
  // Oniguruma's ^ and $ always mean lines.
  impl_->code = pcre2_compile(reinterpret_cast<PCRE2_SPTR>(translated.data()), translated.size(),
                              PCRE2_UTF | PCRE2_UCP | PCRE2_NO_UTF_CHECK | PCRE2_MULTILINE | PCRE2_NEVER_BACKSLASH_C,
                              &error, &where, nullptr);
  if (impl_->code == nullptr)
    path.refuse(fmt::format("'{}' is no valid regular expression: {}", pattern, error_text(error)));
  pcre2_jit_compile(impl_->code, PCRE2_JIT_COMPLETE);  // without a JIT the interpreter does the same, slower
  impl_->field = path.str();
}

std::pair<std::size_t, std::size_t> Regex::find(std::string_view text, std::size_t from, RegexScratch& scratch) const {
  if (scratch.impl_ == nullptr) {
    scratch.impl_ = std::make_unique<RegexScratch::Impl>();
    if (scratch.impl_->data == nullptr || scratch.impl_->context == nullptr)
      fail(ErrorKind::internal, "out of memory for a regular expression");
    pcre2_set_match_limit(scratch.impl_->context, kMatchLimit);
    pcre2_set_heap_limit(scratch.impl_->context, kHeapLimitKiB);
  }
  RegexScratch::Impl& own = *scratch.impl_;
  const auto match = [&] {
    return pcre2_match(impl_->code, reinterpret_cast<PCRE2_SPTR>(text.data()), text.size(), from, PCRE2_NO_UTF_CHECK,
                       own.data, own.context);
  };
  int found = match();
  if (found == PCRE2_ERROR_JIT_STACKLIMIT && own.stack == nullptr) {
    own.stack = pcre2_jit_stack_create(kFirstJitStack, kLargestJitStack, nullptr);
    if (own.stack != nullptr) {
      pcre2_jit_stack_assign(own.context, nullptr, own.stack);
      found = match();
    }
  }
  if (found == PCRE2_ERROR_NOMATCH) return {std::string_view::npos, std::string_view::npos};
  if (found < 0)
    fail(ErrorKind::data, fmt::format("{}: the regular expression gave up: {}", impl_->field, error_text(found)));
  const PCRE2_SIZE* const bounds = pcre2_get_ovector_pointer(own.data);
  return {bounds[0], bounds[1]};
}

}  // namespace shardtune
