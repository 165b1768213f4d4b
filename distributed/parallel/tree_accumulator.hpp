#pragma once
// The canonical order of every sum over micro-batches: a binary tree over their indices, whoever computed them.
// Node (level, index) covers the micro-batches [index * 2^level, min((index + 1) * 2^level, num_leaves)); its value is
// left + right in fp32, or the only child's value where the right one covers nothing.
#include <cstdint>
#include <utility>
#include <vector>

#include "distributed/parallel/packed_pieces.hpp"

namespace shardtune {

struct TreeNode {
  int level = 0;
  std::int64_t index = 0;
  friend bool operator==(const TreeNode&, const TreeNode&) = default;
};

std::int64_t num_leaves_under(TreeNode node, std::int64_t num_leaves);

// The fewest nodes that cover exactly the leaves [begin, end), from left to right, each under its highest label.
// They are what a TreeAccumulator holds after those leaves were added. Empty when begin == end.
std::vector<TreeNode> covering_nodes(std::int64_t begin, std::int64_t end, std::int64_t num_leaves);

// Adds nodes in any order and merges siblings as soon as both are there: the sums are those of the canonical tree
// whatever the order of arrival, and at most about log2(num_leaves) partial sums are held when leaves come in order.
// Not thread-safe.
class TreeAccumulator {
 public:
  using Sum = Pieces;                                 // of the same sizes in every node
  explicit TreeAccumulator(std::int64_t num_leaves);  // >= 1

  // `sum` (fp32) is given away and may be overwritten. Error{internal} for a node outside of the tree or one that was
  // added before.
  void add(TreeNode node, Sum sum);

  bool is_complete() const noexcept;  // the root is there
  Sum take_root();                    // Error{internal} unless complete; empties the accumulator
  using Entry = std::pair<TreeNode, Sum>;
  std::vector<Entry> take_nodes();          // what is left unmerged, from left to right; empties the accumulator
  std::int64_t num_bytes() const noexcept;  // of the partial sums held

 private:
  std::int64_t num_leaves_;
  int top_level_;
  std::vector<Entry> nodes_;  // few: a linear search is the fastest
};

}  // namespace shardtune
