#pragma once
// Tokens and their ids: one arena of bytes and one open-addressing table, built for loading fast.
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace shardtune {

// Hash that grows byte by byte, so that all prefixes of a word cost one pass.
class TokenHash {
 public:
  void add(char byte) { state_ = (state_ ^ static_cast<unsigned char>(byte)) * 0x9E3779B97F4A7C15ULL; }
  void add(std::string_view bytes) {
    for (const char byte : bytes) add(byte);
  }
  std::uint32_t value() const {
    return static_cast<std::uint32_t>((state_ ^ state_ >> 29) * 0xBF58476D1CE4E5B9ULL >> 32);
  }

 private:
  std::uint64_t state_ = 0xCBF29CE484222325ULL;
};

// Immutable after the last insert(); then safe from many threads.
class Vocabulary {
 public:
  void reserve(std::size_t tokens, std::size_t bytes);
  enum class Insert { added, duplicate_token, duplicate_id };
  Insert insert(std::string_view token, std::int32_t id);  // id >= 0

  std::int32_t find(std::string_view token) const {  // -1: unknown
    TokenHash hash;
    hash.add(token);
    return find(token, hash.value());
  }
  std::int32_t find(std::string_view token, std::uint32_t hash) const;
  // The token `prefix` + `rest`, whose hash is given.
  std::int32_t find(std::string_view prefix, std::string_view rest, std::uint32_t hash) const;

  std::string_view token(std::int32_t id) const {  // empty for an id nobody has
    if (id < 0 || static_cast<std::size_t>(id) >= tokens_.size()) return {};
    const Span& span = tokens_[static_cast<std::size_t>(id)];
    return {bytes_.data() + span.offset, span.length};
  }
  bool has_id(std::int32_t id) const {
    return id >= 0 && static_cast<std::size_t>(id) < tokens_.size() && tokens_[static_cast<std::size_t>(id)].used;
  }
  std::size_t size() const { return count_; }
  std::size_t id_limit() const { return tokens_.size(); }  // largest id + 1
  std::size_t longest_token() const { return longest_; }   // bytes

 private:
  struct Slot {
    std::uint32_t hash = 0;
    std::int32_t id = -1;
  };
  struct Span {
    std::uint32_t offset = 0;
    std::uint32_t length : 31 = 0;
    std::uint32_t used : 1 = 0;
  };
  void grow(std::size_t slots);

  std::string bytes_;
  std::vector<Span> tokens_;  // by id
  std::vector<Slot> slots_;   // power of two, at most half full
  std::size_t count_ = 0;
  std::size_t longest_ = 0;
};

}  // namespace shardtune
