#pragma once
// What a rank gives or gets in a collective, where it lies: flat tensors that are taken one after another.
#include <cstdint>
#include <vector>

#include <ATen/core/Tensor.h>

namespace shardtune {

using Pieces = std::vector<at::Tensor>;  // 1-d, contiguous

std::int64_t num_elements(const Pieces& pieces) noexcept;
// The elements [begin, begin + into.numel()) of the pieces, converted to the dtype of `into`.
void copy_out(const Pieces& pieces, std::int64_t begin, const at::Tensor& into);
// The reverse.
void copy_in(const Pieces& pieces, std::int64_t begin, const at::Tensor& from);

// A bucket's parts: counts[0] elements, then counts[1], ...
Pieces split_bucket(const at::Tensor& bucket, const std::vector<std::int64_t>& counts);
// How many elements of each rank chunk number `chunk` moves, with at most numel_per_rank of each.
std::vector<std::int64_t> counts_of_chunk(const std::vector<std::int64_t>& counts, std::int64_t chunk,
                                          std::int64_t numel_per_rank);
// How many chunks it takes, at least one, also for nothing: what combines chunks makes an empty result of it. The same on
// all ranks, who know each other's counts.
std::int64_t num_chunks(const std::vector<std::int64_t>& counts, std::int64_t numel_per_rank);

}  // namespace shardtune
