#include "data/vocabulary.hpp"

#include <algorithm>
#include <bit>
#include <utility>

namespace shardtune {

void Vocabulary::reserve(std::size_t tokens, std::size_t bytes) {
  bytes_.reserve(bytes);
  tokens_.reserve(tokens);
  grow(std::bit_ceil(std::max<std::size_t>(16, tokens * 2)));
}

void Vocabulary::grow(std::size_t slots) {
  std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(slots));
  for (const Slot& slot : old) {
    if (slot.id < 0) continue;
    std::size_t at = slot.hash & (slots - 1);
    while (slots_[at].id >= 0) at = (at + 1) & (slots - 1);
    slots_[at] = slot;
  }
}

Vocabulary::Insert Vocabulary::insert(std::string_view token, std::int32_t id) {
  if (has_id(id)) return Insert::duplicate_id;
  TokenHash hash;
  hash.add(token);
  if (!slots_.empty() && find(token, hash.value()) >= 0) return Insert::duplicate_token;
  if ((count_ + 1) * 2 > slots_.size()) grow(std::max<std::size_t>(16, slots_.size() * 2));
  const auto index = static_cast<std::size_t>(id);
  if (tokens_.size() <= index) tokens_.resize(index + 1);
  tokens_[index] = {static_cast<std::uint32_t>(bytes_.size()), static_cast<std::uint32_t>(token.size()), 1};
  bytes_ += token;
  std::size_t at = hash.value() & (slots_.size() - 1);
  while (slots_[at].id >= 0) at = (at + 1) & (slots_.size() - 1);
  slots_[at] = {hash.value(), id};
  ++count_;
  longest_ = std::max(longest_, token.size());
  return Insert::added;
}

std::int32_t Vocabulary::find(std::string_view whole, std::uint32_t hash) const {
  if (slots_.empty()) return -1;
  for (std::size_t at = hash & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[at];
    if (slot.id < 0) return -1;
    if (slot.hash == hash && token(slot.id) == whole) return slot.id;
  }
}

std::int32_t Vocabulary::find(std::string_view prefix, std::string_view rest, std::uint32_t hash) const {
  if (slots_.empty()) return -1;
  for (std::size_t at = hash & (slots_.size() - 1);; at = (at + 1) & (slots_.size() - 1)) {
    const Slot& slot = slots_[at];
    if (slot.id < 0) return -1;
    if (slot.hash != hash) continue;
    const std::string_view found = token(slot.id);
    if (found.size() == prefix.size() + rest.size() && found.substr(0, prefix.size()) == prefix &&
        found.substr(prefix.size()) == rest)
      return slot.id;
  }
}

}  // namespace shardtune
