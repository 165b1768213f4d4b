#pragma once
// Collectives over several nodes: shared memory within each, messages between ranks of the same place on different
// nodes, all of them at once. Internal to distributed/comm.
#include <memory>

#include "distributed/comm/layered_transport.hpp"

namespace shardtune {

// Rank r is place r % k of node r / k, with k ranks on every node as ranks_per_node() says. A reduction crosses the
// network once per node, in partial results (fp32 for bf16); all_to_all has nothing to combine and goes as messages.
class HierarchicalTransport final : public LayeredTransport {
 public:
  // within: the ranks of this node by place; across: the ranks of this place by node.
  HierarchicalTransport(std::unique_ptr<Transport> messages, const LayerOptions& options,
                        std::unique_ptr<Transport> within, std::unique_ptr<Transport> across);

  void all_gather(const std::byte* send, std::byte* receive, Counts bytes) override;
  void broadcast(std::byte* data, std::int64_t bytes, int root) override;
  void barrier() override;
  std::string describe() const override;
  void all_reduce(std::byte* data, std::int64_t numel, const Reduction& reduction) override;
  void reduce_scatter(const std::byte* in, Counts numels, std::byte* out, const Reduction& reduction) override;
  std::shared_ptr<std::byte> make_buffer(std::int64_t bytes) override { return within_->make_buffer(bytes); }

 private:
  Counts of_node(Counts counts, int node) const;
  // What the ranks of this place have, by node.
  std::vector<std::int64_t> of_place(Counts counts) const;

  std::unique_ptr<Transport> within_;
  std::unique_ptr<Transport> across_;
};

}  // namespace shardtune
