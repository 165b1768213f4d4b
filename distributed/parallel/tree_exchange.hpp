#pragma once
// One reduction over an axis of ranks in the order of the canonical tree: every rank has a node or none, cut into a
// part for each rank; a rank gets its part of all nodes, added up as far as they are siblings. In buckets, so that no
// second copy of what is sent exists.
#include <cstdint>
#include <deque>
#include <optional>
#include <vector>

#include <c10/core/ScalarType.h>

#include "distributed/parallel/bucket_pool.hpp"
#include "distributed/parallel/packed_pieces.hpp"
#include "distributed/parallel/tree_accumulator.hpp"

namespace shardtune {

// The node that a reduction of Communicator makes of the ranks' nodes, where its order of adding is that of the tree.
std::optional<TreeNode> parent_in_order(const std::vector<std::optional<TreeNode>>& of_ranks, std::int64_t num_leaves);

class TreeExchange {
 public:
  struct Nodes {
    std::vector<std::optional<TreeNode>> of_ranks;  // known to all ranks
    std::int64_t num_leaves;
    at::ScalarType dtype;  // in which they travel; sums are fp32
  };
  // Collective over the axis. parts: fp32, what this rank has for each rank, empty where it has no node. They are
  // let go of when they were put into buckets, at the latest when this returns.
  TreeExchange(const ReductionAxis& axis, Nodes nodes, std::vector<Pieces> parts);
  ~TreeExchange();  // drops what is under way
  TreeExchange(const TreeExchange&) = delete;
  TreeExchange& operator=(const TreeExchange&) = delete;

  // Collective. This rank's part of the sums, one tensor each.
  std::vector<TreeAccumulator::Entry> finish();
  std::int64_t num_bytes() const noexcept;  // of these sums

 private:
  Work start(std::int64_t chunk, const at::Tensor& bucket);
  Work start_reduce_scatter(std::int64_t chunk, const at::Tensor& in, const std::vector<std::int64_t>& counts);
  void finish_chunk(std::int64_t chunk);
  at::Tensor own_part(at::Tensor sum, std::int64_t chunk) const;

  ReductionAxis axis_;
  Nodes nodes_;
  std::vector<Pieces> parts_;
  std::int64_t per_rank_;
  std::int64_t num_chunks_;
  std::int64_t own_count_;
  std::optional<TreeNode> parent_;
  std::vector<TreeAccumulator::Entry> sums_;
  std::deque<at::Tensor> received_;  // buckets, in the order of the chunks under way
  BucketStream stream_;
};

}  // namespace shardtune
