#pragma once
// Byte pair merges: (left id, right id) to rank and resulting id, and the two ways of applying them to a word.
#include <cstddef>
#include <cstdint>
#include <limits>
#include <vector>

#include "data/subword_model.hpp"

namespace shardtune {

struct Merge {
  std::int32_t rank = std::numeric_limits<std::int32_t>::max();  // the lowest goes first
  std::int32_t id = -1;                                          // -1: the pair does not merge
};

// Immutable after the last insert(); then safe from many threads.
class MergeTable {
 public:
  explicit MergeTable(std::size_t expected);
  void insert(std::int32_t left, std::int32_t right, Merge merge);  // a pair given twice keeps the later merge
  Merge find(std::int32_t left, std::int32_t right) const {
    const std::uint64_t wanted = key(left, right);
    for (std::size_t at = home(wanted);; at = (at + 1) & mask_) {
      if (slots_[at].key == wanted) return slots_[at].merge;
      if (slots_[at].key == kEmpty) return {};
    }
  }
  // Applies merges to scratch.symbols until none is left: lowest rank first, leftmost first among equals.
  void apply(ModelScratch& scratch) const;

 private:
  static constexpr std::uint64_t kEmpty = ~std::uint64_t{0};  // ids are not negative
  struct Slot {
    std::uint64_t key = kEmpty;
    Merge merge;
  };
  static std::uint64_t key(std::int32_t left, std::int32_t right) {
    return static_cast<std::uint64_t>(static_cast<std::uint32_t>(left)) << 32 | static_cast<std::uint32_t>(right);
  }
  std::size_t home(std::uint64_t k) const {
    return static_cast<std::size_t>((k ^ k >> 29) * 0x9E3779B97F4A7C15ULL >> 32) & mask_;
  }
  void apply_short(ModelScratch& scratch) const;
  void apply_long(ModelScratch& scratch) const;

  std::vector<Slot> slots_;
  std::size_t mask_ = 0;
  std::size_t count_ = 0;
};

}  // namespace shardtune
