#include "distributed/comm/transport.hpp"

#include <algorithm>

namespace shardtune {
namespace {

// Up to this many received bytes one all_gather and a sum on every rank beat two rounds of messages.
constexpr std::int64_t kOneRoundBytes = 64 << 10;

std::vector<const std::byte*> equal_pieces(const std::byte* first, std::int64_t bytes, int num_pieces) {
  std::vector<const std::byte*> pieces;
  for (int piece = 0; piece < num_pieces; ++piece) pieces.push_back(first + piece * bytes);
  return pieces;
}

}  // namespace

std::unique_ptr<std::byte[]> make_scratch(std::int64_t bytes) {
  return std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(bytes));
}

std::vector<std::int64_t> scaled(Transport::Counts counts, std::int64_t factor) {
  std::vector<std::int64_t> result(counts.begin(), counts.end());
  for (auto& count : result) count *= factor;
  return result;
}

std::vector<std::int64_t> even_slices(std::int64_t numel, int num_ranks) {
  constexpr std::int64_t kAlignment = 64;
  const std::int64_t slice = (numel / num_ranks / kAlignment + 1) * kAlignment;
  std::vector<std::int64_t> slices;
  for (std::int64_t begin = 0; std::ssize(slices) < num_ranks; begin += slices.back()) {
    slices.push_back(std::min(slice, numel - begin));
  }
  return slices;
}

std::vector<std::int64_t> offsets_of(Transport::Counts counts) {
  std::vector<std::int64_t> offsets{0};
  for (const std::int64_t count : counts) offsets.push_back(offsets.back() + count);
  return offsets;
}

void Transport::all_reduce(std::byte* data, std::int64_t numel, const Reduction& reduction) {
  const std::int64_t bytes = numel * reduction.in_bytes();
  if (bytes * size() <= kOneRoundBytes) {
    const auto pieces = make_scratch(bytes * size());
    all_gather(data, pieces.get(), std::vector<std::int64_t>(static_cast<std::size_t>(size()), bytes));
    reduce_pieces(equal_pieces(pieces.get(), bytes, size()), numel, reduction, data);
    return;
  }
  // The tree is element-wise, so the cut does not change any bit.
  const std::vector<std::int64_t> slices = even_slices(numel, size());
  std::byte* own = data + offsets_of(slices)[static_cast<std::size_t>(rank())] * reduction.in_bytes();
  reduce_scatter(data, slices, own, reduction);
  all_gather(own, data, scaled(slices, reduction.in_bytes()));
}

// Every rank's version of the own part is collected, then combined in rank order.
void Transport::reduce_scatter(const std::byte* in, Counts numels, std::byte* out, const Reduction& reduction) {
  const std::int64_t own_numel = numels[static_cast<std::size_t>(rank())];
  const std::int64_t own_bytes = own_numel * reduction.in_bytes();
  const auto pieces = make_scratch(own_bytes * size());
  exchange(in, scaled(numels, reduction.in_bytes()), pieces.get(), std::vector<std::int64_t>(numels.size(), own_bytes));
  reduce_pieces(equal_pieces(pieces.get(), own_bytes, size()), own_numel, reduction, out);
}

std::shared_ptr<std::byte> Transport::make_buffer(std::int64_t /*bytes*/) { return nullptr; }

std::shared_ptr<std::byte> Transport::make_shared(std::int64_t /*bytes*/) { return nullptr; }

std::unique_ptr<ProgressBoard> Transport::make_progress_board() { return nullptr; }

}  // namespace shardtune
