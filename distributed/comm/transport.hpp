#pragma once
// What a backend must provide: moving bytes between the ranks of one group, and where operations run. What combines
// numbers goes through reduce_pieces (ordered_reduction.hpp), so that every backend gives the same bits.
// Internal to distributed/comm.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "distributed/comm/communicator.hpp"
#include "distributed/comm/ordered_reduction.hpp"

namespace shardtune {

// Every operation is collective and blocks until this rank's buffers may be reused and hold the result. Counts are
// bytes, one per rank; parts lie in rank order without gaps. Errors: Error{comm}, after which the group is unusable.
class Transport {
 public:
  using Counts = std::span<const std::int64_t>;

  virtual ~Transport() = default;
  virtual int rank() const = 0;
  virtual int size() const = 0;
  virtual bool runs_on_own_cores() const { return false; }  // see Communicator

  // Part r of `send` goes to rank r; `receive` gets receive_bytes[r] bytes from rank r. The buffers do not overlap.
  virtual void exchange(const std::byte* send, Counts send_bytes, std::byte* receive, Counts receive_bytes) = 0;
  // receive := concatenation of every rank's `send`, bytes[rank()] long. `send` may be exactly its place in `receive`.
  virtual void all_gather(const std::byte* send, std::byte* receive, Counts bytes) = 0;
  virtual void broadcast(std::byte* data, std::int64_t bytes, int root) = 0;
  virtual void barrier() = 0;
  // Ranks of one colour, ordered by (key, rank). Colours are >= 0.
  virtual std::unique_ptr<Transport> split(int color, int key) = 0;

  // Reductions. Made of the movements above; a backend may join movement and sum, never reorder the sum.
  // data := the reduction over ranks, numel elements, not partial.
  virtual void all_reduce(std::byte* data, std::int64_t numel, const Reduction& reduction);
  // out := part rank() of the reduction over ranks of `in`; `numels` are the elements of each part. `out` may be
  // exactly this rank's part of `in` where the element sizes are the same.
  virtual void reduce_scatter(const std::byte* in, Counts numels, std::byte* out, const Reduction& reduction);

  virtual std::string describe() const = 0;  // how bytes move, in a few words

  // Memory of this rank that the group's operations reach without copies (the same size on every rank); null where
  // there is no such thing. It is valid as long as this pointer, also after the transport's end.
  virtual std::shared_ptr<std::byte> make_buffer(std::int64_t bytes);
  // Memory that all ranks of the group have in common, on a page or at least a 64-byte boundary; null on every rank
  // where there is no such thing. Valid as long as this pointer.
  virtual std::shared_ptr<std::byte> make_shared(std::int64_t bytes);
  virtual std::unique_ptr<ProgressBoard> make_progress_board();  // null on every rank where make_shared() gives nothing
};

// Equal slices for all but the last ranks, in multiples of 64 elements, so that no two ranks write one cache line.
std::vector<std::int64_t> even_slices(std::int64_t numel, int num_ranks);
// Each times `factor`: elements to bytes.
std::vector<std::int64_t> scaled(Transport::Counts counts, std::int64_t factor);
std::unique_ptr<std::byte[]> make_scratch(std::int64_t bytes);  // uninitialised
// Where each part begins; one entry more than parts, the last is the total.
std::vector<std::int64_t> offsets_of(Transport::Counts counts);

// Runs the operations of one process (or thread rank) in the order of their submission.
class Executor {
 public:
  virtual ~Executor() = default;
  // The operation's exception reaches the caller of submit() or of Work::wait(). The operation (and what it captured)
  // is destroyed before wait() returns.
  [[nodiscard]] virtual Work submit(std::function<void()> operation) = 0;
  // Drops this reference after all that was submitted, where operations run. Does not wait: peers may be gone.
  virtual void dispose(std::shared_ptr<Transport> transport) noexcept = 0;
};

}  // namespace shardtune
