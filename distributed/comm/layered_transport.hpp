#pragma once
// Chooses how a group communicates: through shared memory on one node, in two levels over several nodes of equal size,
// by messages alone otherwise. Internal to distributed/comm and its tests.
#include <atomic>
#include <chrono>
#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <string>

#include "distributed/comm/transport.hpp"

namespace shardtune {

enum class SharedMemoryUse {
  never,
  if_possible,  // one warning and messages instead where the system refuses it
  always,       // Error{comm} where the system refuses it
};

// The same on all ranks, but for `node`.
struct LayerOptions {
  SharedMemoryUse use = SharedMemoryUse::if_possible;
  std::int64_t node = 0;        // equal for ranks that can share memory
  std::int64_t slot_bytes = 0;  // staging memory per rank, two of these; 0 lets the number of ranks decide
  std::chrono::nanoseconds timeout = std::chrono::minutes(30);  // of every wait for another rank in shared memory
  // Of all groups of this rank: the warning is given once.
  std::shared_ptr<std::atomic<bool>> has_warned = std::make_shared<std::atomic<bool>>(false);
};

// Forwards to `messages`; parts made by split() choose anew. The base of what does better.
class LayeredTransport : public Transport {
 public:
  LayeredTransport(std::unique_ptr<Transport> messages, LayerOptions options, bool is_one_node);

  int rank() const final { return rank_; }
  int size() const final { return size_; }
  bool runs_on_own_cores() const final { return is_one_node_; }
  void exchange(const std::byte* send, Counts send_bytes, std::byte* receive, Counts receive_bytes) override;
  void all_gather(const std::byte* send, std::byte* receive, Counts bytes) override;
  void broadcast(std::byte* data, std::int64_t bytes, int root) override;
  void barrier() override;
  std::string describe() const override { return messages_->describe(); }
  std::unique_ptr<Transport> split(int color, int key) final;

  Transport& messages() noexcept { return *messages_; }
  const LayerOptions& options() const noexcept { return options_; }
  // Shared memory is refused: Error{comm} where it must be used, otherwise one warning per process from each speaker.
  void report_refusal(const std::string& refusal, bool is_speaker);

 private:
  std::unique_ptr<Transport> messages_;
  LayerOptions options_;
  bool is_one_node_;
  int rank_;
  int size_;
};

// Collective over the ranks of `messages`. Never null.
std::unique_ptr<Transport> make_layered_transport(std::unique_ptr<Transport> messages, const LayerOptions& options);

// How many ranks each node holds, given every rank's node: more than one node, all with the same number of ranks, a
// power of two above one, consecutive ranks together. Only then do sums over the ranks of a node, summed over nodes,
// follow the tree over all ranks (distances 1, 2, 4, ... first stay within a node, then lead to the same place on
// another).
std::optional<int> ranks_per_node(std::span<const std::int64_t> node_of_rank);

}  // namespace shardtune
