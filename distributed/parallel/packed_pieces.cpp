#include "distributed/parallel/packed_pieces.hpp"

#include <algorithm>

namespace shardtune {
namespace {

// Calls visit(part of a piece, part of the buffer) for everything in [begin, begin + buffer.numel()).
template <class Visit>
void for_each_part(const Pieces& pieces, std::int64_t begin, const at::Tensor& buffer, Visit visit) {
  const std::int64_t end = begin + buffer.numel();
  std::int64_t at_element = 0;
  for (const at::Tensor& piece : pieces) {
    const std::int64_t first = std::max(begin, at_element);
    const std::int64_t last = std::min(end, at_element + piece.numel());
    if (first < last)
      visit(piece.narrow(0, first - at_element, last - first), buffer.narrow(0, first - begin, last - first));
    at_element += piece.numel();
    if (at_element >= end) return;
  }
}

}  // namespace

std::int64_t num_elements(const Pieces& pieces) noexcept {
  std::int64_t count = 0;
  for (const at::Tensor& piece : pieces) count += piece.numel();
  return count;
}

void copy_out(const Pieces& pieces, std::int64_t begin, const at::Tensor& into) {
  for_each_part(pieces, begin, into, [](const at::Tensor& piece, at::Tensor part) { part.copy_(piece); });
}

void copy_in(const Pieces& pieces, std::int64_t begin, const at::Tensor& from) {
  for_each_part(pieces, begin, from, [](at::Tensor piece, const at::Tensor& part) { piece.copy_(part); });
}

Pieces split_bucket(const at::Tensor& bucket, const std::vector<std::int64_t>& counts) {
  Pieces parts;
  std::int64_t at_element = 0;
  for (const std::int64_t count : counts) {
    parts.push_back(bucket.narrow(0, at_element, count));
    at_element += count;
  }
  return parts;
}

std::vector<std::int64_t> counts_of_chunk(const std::vector<std::int64_t>& counts, std::int64_t chunk,
                                          std::int64_t numel_per_rank) {
  std::vector<std::int64_t> in_chunk;
  for (const std::int64_t count : counts) {
    in_chunk.push_back(std::clamp(count - chunk * numel_per_rank, std::int64_t{0}, numel_per_rank));
  }
  return in_chunk;
}

std::int64_t num_chunks(const std::vector<std::int64_t>& counts, std::int64_t numel_per_rank) {
  const std::int64_t longest = *std::max_element(counts.begin(), counts.end());
  return std::max((longest + numel_per_rank - 1) / numel_per_rank, std::int64_t{1});
}

}  // namespace shardtune
