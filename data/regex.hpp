#pragma once
// Regular expressions of tokenizer files through PCRE2's JIT, with the character classes of the engines that Hugging
// Face uses (Oniguruma, Rust): \s is White_Space, \p{L}, \p{N} and \w know Unicode 16.
#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <utility>

#include "data/tokenizer_error.hpp"

namespace shardtune {

// Match data and the JIT's stack, for one thread at a time.
class RegexScratch {
 public:
  RegexScratch();
  ~RegexScratch();
  RegexScratch(const RegexScratch&) = delete;
  RegexScratch& operator=(const RegexScratch&) = delete;

 private:
  friend class Regex;
  struct Impl;
  std::unique_ptr<Impl> impl_;  // made when first used
};

// Immutable; find() may be called from many threads with a scratch each.
class Regex {
 public:
  Regex(const std::string& pattern, const FieldPath& path);  // Error{data}: not a valid expression
  ~Regex();
  Regex(Regex&&) noexcept;
  // The first match at or after `from` in valid UTF-8; {npos, npos} when there is none. Never overflows the stack:
  // Error{data} where an expression needs more than its limits of memory or steps.
  std::pair<std::size_t, std::size_t> find(std::string_view text, std::size_t from, RegexScratch& scratch) const;

 private:
  struct Impl;
  std::unique_ptr<Impl> impl_;
};

}  // namespace shardtune
