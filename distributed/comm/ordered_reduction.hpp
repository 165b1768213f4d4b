#pragma once
// The one place where values of different ranks are combined. Thread-safe (no state). Internal to distributed/comm.
#include <cstddef>
#include <cstdint>

#include <c10/core/ScalarType.h>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

// out[i] := reduction over p of pieces[p * numel + i], for num_pieces pieces lying one behind the other.
// Order: the binary tree over piece numbers in which neighbours at distance 1, then 2, 4, ... are combined, the lower
// number on the left; a piece without a neighbour moves up unchanged. bf16 is summed in fp32 and rounded once.
// int64 sums wrap around. max and min give NaN when any piece holds NaN.
// dtype: fp32, fp64, bf16, int64; for max and min also uint8. `out` may be pieces + 0 (the first piece), otherwise it
// does not overlap the pieces.
void reduce_pieces(const std::byte* pieces, int num_pieces, std::int64_t numel, at::ScalarType dtype, ReduceOp op,
                   std::byte* out);

}  // namespace shardtune
