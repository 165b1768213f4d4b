// The memory that ShmTransport gives to its callers.
#include <cstddef>
#include <cstdint>
#include <memory>
#include <new>
#include <utility>
#include <vector>

#include "distributed/comm/shm_transport.hpp"

namespace shardtune {
namespace {

class ShmProgressBoard final : public ProgressBoard {
 public:
  // counters: one per rank, zero.
  ShmProgressBoard(std::shared_ptr<std::byte> counters, PeerWait peers)
      : counters_(std::move(counters)), peers_(std::move(peers)) {}

  void publish(std::int64_t step) override { counter(peers_.rank).publish(static_cast<std::uint32_t>(step)); }
  void wait_for_all(std::int64_t step) override {
    for (int rank = 0; rank < static_cast<int>(peers_.process_of_rank.size()); ++rank) {
      if (rank != peers_.rank) peers_.wait(counter(rank), static_cast<std::uint32_t>(step), rank, "memory in common");
    }
  }

 private:
  SharedCounter& counter(int rank) const { return reinterpret_cast<SharedCounter*>(counters_.get())[rank]; }

  std::shared_ptr<std::byte> counters_;
  PeerWait peers_;
};

}  // namespace

std::shared_ptr<std::byte> ShmTransport::make_buffer(std::int64_t bytes) {
  drop_unused_buffers();
  SharedSegmentResult made = make_shared_segment(*this, bytes);
  if (!made.segment) {
    report_refusal(made.refusal, rank() == 0);
    return nullptr;
  }
  buffers_.push_back({++num_buffers_made_, made.segment});
  return {made.segment, made.segment->part(rank())};
}

std::shared_ptr<std::byte> ShmTransport::make_shared(std::int64_t bytes) {
  // The parts of a segment follow each other: each rank reserves one of them.
  SharedSegmentResult made = make_shared_segment(*this, (bytes + size() - 1) / size());
  if (!made.segment) {
    report_refusal(made.refusal, rank() == 0);
    return nullptr;
  }
  return {made.segment, made.segment->part(0)};
}

std::unique_ptr<ProgressBoard> ShmTransport::make_progress_board() {
  std::shared_ptr<std::byte> counters = make_shared(size() * static_cast<std::int64_t>(sizeof(SharedCounter)));
  if (!counters) return nullptr;
  new (counters.get() + rank() * sizeof(SharedCounter)) SharedCounter();
  barrier();
  return std::make_unique<ShmProgressBoard>(std::move(counters), peers_);
}

void ShmTransport::drop_unused_buffers() {
  const std::size_t num_buffers = buffers_.size();
  if (num_buffers == 0) return;
  std::vector<std::uint8_t> in_use(num_buffers * static_cast<std::size_t>(size()));
  for (std::size_t i = 0; i < num_buffers; ++i) {
    in_use[static_cast<std::size_t>(rank()) * num_buffers + i] = buffers_[i].segment.use_count() > 1 ? 1 : 0;
  }
  auto* all = reinterpret_cast<std::byte*>(in_use.data());
  const std::vector<std::int64_t> counts_of_ranks(static_cast<std::size_t>(size()),
                                                  static_cast<std::int64_t>(num_buffers));
  all_gather(all + static_cast<std::size_t>(rank()) * num_buffers, all, counts_of_ranks);
  std::vector<Buffer> kept;
  for (std::size_t i = 0; i < num_buffers; ++i) {
    bool is_used = false;
    for (std::size_t r = 0; r < static_cast<std::size_t>(size()); ++r)
      is_used = is_used || in_use[r * num_buffers + i] != 0;
    if (is_used) kept.push_back(buffers_[i]);
  }
  buffers_ = std::move(kept);
}

}  // namespace shardtune
