#include "distributed/comm/layered_transport.hpp"

#include <algorithm>
#include <bit>
#include <string>
#include <utility>
#include <vector>

#include <sched.h>
#include <unistd.h>

#include "core/error.hpp"
#include "core/log.hpp"
#include "distributed/comm/hierarchical_transport.hpp"
#include "distributed/comm/shm_transport.hpp"

namespace shardtune {
namespace {

// Half a second-level cache and less: a slot is written by one core and read by another while it is still warm.
constexpr std::int64_t kSlotBytes = 256 << 10;
constexpr std::int64_t kSlotBytesOfNode = 8 << 20;  // many ranks share this
constexpr std::int64_t kMinSlotBytes = 32 << 10;
// About 20 microseconds: longer than a rank on another core needs for its part of a round.
constexpr int kNumSpins = 400;

template <class T>
std::vector<T> gather(Transport& transport, const T& mine) {
  std::vector<T> all(static_cast<std::size_t>(transport.size()));
  const std::vector<std::int64_t> counts(all.size(), sizeof(T));
  transport.all_gather(reinterpret_cast<const std::byte*>(&mine), reinterpret_cast<std::byte*>(all.data()), counts);
  return all;
}

// Do these ranks have a core each? Binding by the launcher counts, what else runs on the machine does not.
bool has_core_for_each(Transport& transport) {
  cpu_set_t own;
  CPU_ZERO(&own);
  if (::sched_getaffinity(0, sizeof own, &own) != 0) CPU_ZERO(&own);
  cpu_set_t all;
  CPU_ZERO(&all);
  for (const cpu_set_t& cores : gather(transport, own)) CPU_OR(&all, &all, &cores);
  return CPU_COUNT(&all) >= transport.size();
}

std::int64_t slot_bytes_for(int size, const LayerOptions& options) {
  const std::int64_t least = 64 * size;  // a cache line for every rank
  if (options.slot_bytes > 0) return std::max((options.slot_bytes + 63) / 64 * 64, least);
  return std::max(std::clamp(kSlotBytesOfNode / size / 64 * 64, kMinSlotBytes, kSlotBytes), least);
}

struct NodeResult {
  std::optional<ShmTransport::Setup> setup;
  std::string refusal;
};

NodeResult set_up_node(Transport& messages, const LayerOptions& options) {
  const std::int64_t slot_bytes = slot_bytes_for(messages.size(), options);
  SharedSegmentResult made = make_shared_segment(messages, ShmTransport::part_bytes(messages.size(), slot_bytes));
  if (!made.segment) return {std::nullopt, std::move(made.refusal)};
  WaitPolicy wait;
  wait.num_spins = has_core_for_each(messages) ? kNumSpins : 0;
  wait.timeout = options.timeout;
  return {ShmTransport::Setup{std::move(made.segment),
                              slot_bytes,
                              {wait, messages.rank(), gather(messages, static_cast<std::int64_t>(::getpid()))}},
          {}};
}

std::unique_ptr<Transport> make_hierarchical(std::unique_ptr<Transport> messages, const LayerOptions& options,
                                             int node_size) {
  const int node = messages->rank() / node_size;
  const int place = messages->rank() % node_size;
  std::unique_ptr<Transport> within = messages->split(node, place);
  NodeResult result = set_up_node(*within, options);
  // All nodes or none: the two ways do not mix.
  const std::vector<char> is_ready = gather(*messages, static_cast<char>(result.setup.has_value()));
  if (!std::all_of(is_ready.begin(), is_ready.end(), [](char ready) { return ready != 0; })) {
    const bool is_refused_here = !result.setup;
    auto plain = std::make_unique<LayeredTransport>(std::move(messages), options, /*is_one_node=*/false);
    plain->report_refusal(is_refused_here ? result.refusal : "shared memory is refused on another node",
                          is_refused_here && place == 0);
    return plain;
  }
  std::unique_ptr<Transport> across = messages->split(place, node);
  auto on_node = std::make_unique<ShmTransport>(std::move(within), options, std::move(*result.setup));
  return std::make_unique<HierarchicalTransport>(std::move(messages), options, std::move(on_node), std::move(across));
}

}  // namespace

std::optional<int> ranks_per_node(std::span<const std::int64_t> node_of_rank) {
  std::vector<std::int64_t> nodes;
  std::vector<int> sizes;
  for (const std::int64_t node : node_of_rank) {
    if (nodes.empty() || nodes.back() != node) {
      if (std::find(nodes.begin(), nodes.end(), node) != nodes.end()) return std::nullopt;
      nodes.push_back(node);
      sizes.push_back(0);
    }
    ++sizes.back();
  }
  const auto size = static_cast<unsigned>(sizes.front());
  const bool is_even = std::all_of(sizes.begin(), sizes.end(), [&](int other) { return other == sizes.front(); });
  if (nodes.size() < 2 || !is_even || size < 2 || !std::has_single_bit(size)) return std::nullopt;
  return sizes.front();
}

std::unique_ptr<Transport> make_layered_transport(std::unique_ptr<Transport> messages, const LayerOptions& options) {
  const std::vector<std::int64_t> nodes = gather(*messages, options.node);
  const bool is_one_node = std::all_of(nodes.begin(), nodes.end(), [&](auto node) { return node == nodes.front(); });
  std::string refusal;
  if (messages->size() > 1 && options.use != SharedMemoryUse::never) {
    if (is_one_node) {
      NodeResult result = set_up_node(*messages, options);
      if (result.setup) return std::make_unique<ShmTransport>(std::move(messages), options, std::move(*result.setup));
      refusal = std::move(result.refusal);
    } else if (const auto node_size = ranks_per_node(nodes)) {
      return make_hierarchical(std::move(messages), options, *node_size);
    }
  }
  auto plain = std::make_unique<LayeredTransport>(std::move(messages), options, is_one_node);
  if (!refusal.empty()) plain->report_refusal(refusal, plain->rank() == 0);
  return plain;
}

LayeredTransport::LayeredTransport(std::unique_ptr<Transport> messages, LayerOptions options, bool is_one_node)
    : messages_(std::move(messages)),
      options_(std::move(options)),
      is_one_node_(is_one_node),
      rank_(messages_->rank()),
      size_(messages_->size()) {}

void LayeredTransport::exchange(const std::byte* send, Counts send_bytes, std::byte* receive, Counts receive_bytes) {
  messages_->exchange(send, send_bytes, receive, receive_bytes);
}

void LayeredTransport::all_gather(const std::byte* send, std::byte* receive, Counts bytes) {
  messages_->all_gather(send, receive, bytes);
}

void LayeredTransport::broadcast(std::byte* data, std::int64_t bytes, int root) {
  messages_->broadcast(data, bytes, root);
}

void LayeredTransport::barrier() { messages_->barrier(); }

std::unique_ptr<Transport> LayeredTransport::split(int color, int key) {
  return make_layered_transport(messages_->split(color, key), options_);
}

void LayeredTransport::report_refusal(const std::string& refusal, bool is_speaker) {
  constexpr const char* kAdvice = "make /dev/shm larger (containers: --shm-size) or set SHARDTUNE_COMM=mpi";
  if (options_.use == SharedMemoryUse::always) fail(ErrorKind::comm, fmt::format("{}; {}", refusal, kAdvice));
  if (!is_speaker || options_.has_warned->exchange(true)) return;
  log::all_ranks::warn("{}. The ranks communicate through MPI alone, which is slower; {}", refusal, kAdvice);
}

}  // namespace shardtune
