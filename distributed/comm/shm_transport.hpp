#pragma once
// Collectives through shared memory, for the ranks of one node. Internal to distributed/comm.
//
// Each rank has two slots in the segment and a counter of the rounds it has entered. A round: put what others need into
// the slot of this round, raise the counter, wait until all counters are there, read the others' slots. When a rank has
// entered round k + 1 it has read everything of round k, so two slots taken in turn are enough and nothing else is ever
// waited for. Tensors larger than a slot take several rounds. Tensors in memory from make_buffer() are read where they
// are: a round to begin, a round to end, no copies.
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "distributed/comm/layered_transport.hpp"
#include "distributed/comm/shared_counter.hpp"
#include "distributed/comm/shared_segment.hpp"

namespace shardtune {

// How a rank of a node waits for another one in shared memory.
struct PeerWait {
  WaitPolicy policy;
  int rank;
  std::vector<std::int64_t> process_of_rank;  // for messages

  // Blocks until the counter of rank `other` has reached `value`; Error{comm} after the policy's timeout.
  void wait(SharedCounter& counter, std::uint32_t value, int other, const char* operation) const;
};

class ShmTransport final : public LayeredTransport {
 public:
  // `segment` has part_bytes(size of group, options) in each part and is fresh.
  struct Setup {
    std::shared_ptr<SharedSegment> segment;
    std::int64_t slot_bytes;
    PeerWait peers;
  };
  ShmTransport(std::unique_ptr<Transport> messages, const LayerOptions& options, Setup setup);

  void exchange(const std::byte* send, Counts send_bytes, std::byte* receive, Counts receive_bytes) override;
  void all_gather(const std::byte* send, std::byte* receive, Counts bytes) override;
  void broadcast(std::byte* data, std::int64_t bytes, int root) override;
  void barrier() override;
  std::string describe() const override { return "shared memory"; }
  void all_reduce(std::byte* data, std::int64_t numel, const Reduction& reduction) override;
  void reduce_scatter(const std::byte* in, Counts numels, std::byte* out, const Reduction& reduction) override;
  std::shared_ptr<std::byte> make_buffer(std::int64_t bytes) override;
  std::shared_ptr<std::byte> make_shared(std::int64_t bytes) override;
  std::unique_ptr<ProgressBoard> make_progress_board() override;

  static std::int64_t part_bytes(int size, std::int64_t slot_bytes);

 private:
  enum class Operation : std::int64_t { exchange = 1, all_gather, broadcast, barrier, all_reduce, reduce_scatter };
  // Where this rank's part of an operation lies, for the others.
  struct Place {
    static constexpr std::int64_t kSlot = 0;      // in its slots
    static constexpr std::int64_t kNowhere = -1;  // it has nothing to give
    std::int64_t buffer = kSlot;                  // number of a buffer, or one of the above
    std::int64_t offset = 0;
  };
  // What a rank says as it enters an operation.
  struct alignas(64) Header {
    Operation operation;
    std::int64_t bytes;
    Place place;
  };
  struct Call {
    Operation operation;
    std::int64_t bytes;  // what all ranks must agree on
    Place place;
    std::int64_t step;   // bytes of a part that one round in slots moves
    Counts counts = {};  // for the others to see, one per rank, or none
  };
  enum class Source { slots, buffers, mixed };
  // One rank's work. stage(begin) fills its slot with its part from `begin` on, consume(begin) takes the others' out of
  // theirs; longest(), after the first round, is the longest part. direct() takes everything out of buffers.
  struct Steps {
    std::function<void(std::int64_t)> stage;
    std::function<std::int64_t()> longest;
    std::function<void(std::int64_t)> consume;
    std::function<void()> direct;
  };

  void run(const Call& call, const Steps& steps);
  Steps all_reduce_at_once(std::byte* data, std::int64_t bytes, const Reduction& reduction);
  Steps all_reduce_by_slices(std::byte* data, std::int64_t bytes, const Reduction& reduction);
  void all_reduce_in_buffers(std::int64_t numel, const Reduction& reduction);

  void begin_round(const Call& call);
  void meet(Operation operation);
  Source enter(const Call& call);
  Place locate(const std::byte* data, std::int64_t bytes) const;
  template <class Take>
  void for_other_ranks(Take take) const;  // each rank begins with another one
  std::int64_t step_per_rank() const noexcept;

  std::byte* parity_area(int rank) const noexcept;
  Header& header(int rank) const noexcept { return *reinterpret_cast<Header*>(parity_area(rank)); }
  std::int64_t* counts(int rank) const noexcept;
  std::byte* slot(int rank) const noexcept;
  SharedCounter& counter(int rank) const noexcept { return *reinterpret_cast<SharedCounter*>(segment_->part(rank)); }
  std::byte* in_buffer(int rank) const noexcept { return addresses_[static_cast<std::size_t>(rank)]; }
  static const char* name_of(Operation operation);
  [[noreturn]] void fail_different() const;

  // Kept until a later make_buffer() finds that no rank has tensors in it any more: what one rank can reach all can.
  struct Buffer {
    std::int64_t number;
    std::shared_ptr<SharedSegment> segment;
  };
  void drop_unused_buffers();

  std::shared_ptr<SharedSegment> segment_;
  std::int64_t slot_bytes_;
  PeerWait peers_;
  std::uint32_t round_ = 0;
  std::vector<Buffer> buffers_;
  std::int64_t num_buffers_made_ = 0;
  std::vector<std::byte*> addresses_;  // of every rank's place, during an operation on buffers
};

}  // namespace shardtune
