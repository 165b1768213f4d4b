#include "data/merge_table.hpp"

#include <algorithm>
#include <bit>
#include <functional>
#include <utility>

namespace shardtune {
namespace {

// Up to here looking at every pair for each merge beats a heap.
constexpr std::size_t kShortWord = 48;

}  // namespace

MergeTable::MergeTable(std::size_t expected) {
  slots_.resize(std::bit_ceil(std::max<std::size_t>(16, expected + expected / 2)));
  mask_ = slots_.size() - 1;
}

void MergeTable::insert(std::int32_t left, std::int32_t right, Merge merge) {
  if ((count_ + 1) * 4 > slots_.size() * 3) {
    std::vector<Slot> old = std::exchange(slots_, std::vector<Slot>(slots_.size() * 2));
    mask_ = slots_.size() - 1;
    for (const Slot& slot : old) {
      if (slot.key == kEmpty) continue;
      std::size_t at = home(slot.key);
      while (slots_[at].key != kEmpty) at = (at + 1) & mask_;
      slots_[at] = slot;
    }
  }
  const std::uint64_t wanted = key(left, right);
  std::size_t at = home(wanted);
  while (slots_[at].key != kEmpty && slots_[at].key != wanted) at = (at + 1) & mask_;
  if (slots_[at].key == kEmpty) ++count_;
  slots_[at] = {wanted, merge};
}

void MergeTable::apply(ModelScratch& scratch) const {
  if (scratch.symbols.size() < 2) return;
  if (scratch.symbols.size() <= kShortWord)
    apply_short(scratch);
  else
    apply_long(scratch);
}

void MergeTable::apply_short(ModelScratch& scratch) const {
  WordToken* const symbols = scratch.symbols.data();
  std::size_t count = scratch.symbols.size();
  Merge merges[kShortWord];  // of symbol i with the next one
  for (std::size_t i = 0; i + 1 < count; ++i) merges[i] = find(symbols[i].id, symbols[i + 1].id);
  while (count > 1) {
    std::size_t best = 0;
    for (std::size_t i = 1; i + 1 < count; ++i)
      if (merges[i].rank < merges[best].rank) best = i;
    if (merges[best].id < 0) break;
    symbols[best] = {merges[best].id, symbols[best].length + symbols[best + 1].length};
    std::move(symbols + best + 2, symbols + count, symbols + best + 1);
    if (best + 2 < count) std::move(merges + best + 2, merges + count - 1, merges + best + 1);
    --count;
    if (best > 0) merges[best - 1] = find(symbols[best - 1].id, symbols[best].id);
    if (best + 1 < count) merges[best] = find(symbols[best].id, symbols[best + 1].id);
  }
  scratch.symbols.resize(count);
}

// Heap of candidate merges over a linked list of symbols; entries whose pair has changed since are skipped.
void MergeTable::apply_long(ModelScratch& scratch) const {
  std::vector<WordToken>& symbols = scratch.symbols;
  const auto count = static_cast<std::int32_t>(symbols.size());
  scratch.next.resize(symbols.size());
  scratch.previous.resize(symbols.size());
  std::vector<std::uint64_t>& heap = scratch.heap;
  heap.clear();
  const auto at = [&](std::int32_t i) -> WordToken& { return symbols[static_cast<std::size_t>(i)]; };
  const auto next = [&](std::int32_t i) -> std::int32_t& { return scratch.next[static_cast<std::size_t>(i)]; };
  const auto previous = [&](std::int32_t i) -> std::int32_t& { return scratch.previous[static_cast<std::size_t>(i)]; };
  // Rank above position in one number: the order in which merges happen.
  const auto candidate = [&](std::int32_t left, std::int32_t right) {
    const Merge merge = find(at(left).id, at(right).id);
    if (merge.id >= 0) heap.push_back(static_cast<std::uint64_t>(merge.rank) << 32 | static_cast<std::uint32_t>(left));
    return merge.id >= 0;
  };
  for (std::int32_t i = 0; i < count; ++i) {
    next(i) = i + 1 < count ? i + 1 : -1;
    previous(i) = i - 1;
    if (i + 1 < count) candidate(i, i + 1);
  }
  std::make_heap(heap.begin(), heap.end(), std::greater<>());
  while (!heap.empty()) {
    std::pop_heap(heap.begin(), heap.end(), std::greater<>());
    const std::uint64_t top = heap.back();
    heap.pop_back();
    const auto left = static_cast<std::int32_t>(top & 0xFFFFFFFFU);
    if (at(left).length == 0 || next(left) < 0) continue;
    const std::int32_t right = next(left);
    const Merge merge = find(at(left).id, at(right).id);
    if (merge.id < 0 || static_cast<std::uint64_t>(merge.rank) != top >> 32) continue;
    at(left) = {merge.id, at(left).length + at(right).length};
    at(right).length = 0;
    next(left) = next(right);
    if (next(left) >= 0) previous(next(left)) = left;
    if (previous(left) >= 0 && candidate(previous(left), left))
      std::push_heap(heap.begin(), heap.end(), std::greater<>());
    if (next(left) >= 0 && candidate(left, next(left))) std::push_heap(heap.begin(), heap.end(), std::greater<>());
  }
  std::erase_if(symbols, [](const WordToken& symbol) { return symbol.length == 0; });
}

}  // namespace shardtune
