#pragma once
// The one place where values of different ranks are combined. Thread-safe (no state). Internal to distributed/comm.
#include <cstddef>
#include <cstdint>
#include <span>

#include <c10/core/ScalarType.h>

#include "distributed/comm/communicator.hpp"

namespace shardtune {

struct Reduction {
  at::ScalarType dtype;  // of the pieces: fp32, fp64, bf16, int64; for max and min also uint8
  ReduceOp op;
  // The result is combined further: bf16 pieces give fp32 results, which nothing has rounded yet.
  bool is_partial = false;

  at::ScalarType out_dtype() const { return is_partial && dtype == at::kBFloat16 ? at::kFloat : dtype; }
  std::int64_t in_bytes() const { return static_cast<std::int64_t>(c10::elementSize(dtype)); }
  std::int64_t out_bytes() const { return static_cast<std::int64_t>(c10::elementSize(out_dtype())); }
};

// Loops are compiled for each, from the oldest to the newest; all give the same bits.
enum class ReductionInstructions { portable, avx2, avx512, avx512_bf16 };
ReductionInstructions best_reduction_instructions() noexcept;  // of this processor

// out[i] := reduction over p of pieces[p][i], i < numel, in the order of the binary tree over piece numbers in which
// neighbours at distance 1, then 2, 4, ... are combined, the lower number on the left; a piece without a neighbour
// moves up unchanged. bf16 is summed in fp32 and rounded once. int64 sums wrap around. max and min give NaN when any
// piece holds NaN. `out` may be exactly one of the pieces (same element size); otherwise it overlaps none.
void reduce_pieces(std::span<const std::byte* const> pieces, std::int64_t numel, const Reduction& reduction,
                   std::byte* out, ReductionInstructions instructions = best_reduction_instructions());

// out := the final value of a partial result: rounded where the partial is wider, otherwise copied (or left in place).
void finish_partial(const std::byte* partial, std::int64_t numel, const Reduction& reduction, std::byte* out);

}  // namespace shardtune
