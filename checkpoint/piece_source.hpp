#pragma once
// Where a shard's elements come from: a snapshot of a running job, or an offline tool.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <optional>

#include "checkpoint/state_view.hpp"

namespace shardtune {

class PieceSource {
 public:
  // Bytes [begin, begin + size) of slice `slice`.
  struct Piece {
    std::size_t slice = 0;
    std::uint64_t begin = 0;
    std::size_t size = 0;
  };
  static constexpr std::size_t kPieceBytes = std::size_t{4} << 20;  // the most a piece holds

  virtual ~PieceSource() = default;
  // What there is; its elements are given out by take() only.
  virtual const StateView& view() const = 0;
  // Bytes [begin, begin + size) of a piece have been copied: a little at a time where the source can, while it lies in
  // the cache.
  using Copied = std::function<void(const Piece& piece, std::size_t begin, std::size_t size)>;
  // Copies one piece into `into` (kPieceBytes), telling of its parts in order; every piece is given out exactly once,
  // in an order of the source's choice; nothing when all were given out.
  virtual std::optional<Piece> take(void* into, const Copied& copied) = 0;
  // The taker has failed and will take nothing more.
  virtual void abandon() {}
};

}  // namespace shardtune
