#pragma once
// UTF-8 as RFC 3629 defines it. Thread-safe (no state).
#include <cstddef>
#include <string_view>

namespace shardtune {

// Byte offset of the first byte that does not belong to a valid sequence (overlong forms, surrogates, code points above
// U+10FFFF and cut sequences are invalid), or text.size() when all is valid. NUL is valid.
std::size_t valid_utf8_prefix(std::string_view text) noexcept;

// The longest prefix of at most max_bytes that does not cut a sequence. text must be valid.
std::string_view utf8_head(std::string_view text, std::size_t max_bytes) noexcept;

}  // namespace shardtune
