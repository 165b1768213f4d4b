#include "distributed/parallel/tree_accumulator.hpp"

#include <algorithm>
#include <bit>

#include <ATen/core/grad_mode.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

int top_level(std::int64_t num_leaves) { return std::bit_width(static_cast<std::uint64_t>(num_leaves) - 1); }

struct LeafRange {
  std::int64_t begin;
  std::int64_t end;
};

void cover(TreeNode node, LeafRange wanted, std::int64_t num_leaves, std::vector<TreeNode>& out) {
  const std::int64_t first = node.index << node.level;
  const std::int64_t last = std::min((node.index + 1) << node.level, num_leaves);
  if (first >= last || first >= wanted.end || last <= wanted.begin) return;
  if (first >= wanted.begin && last <= wanted.end) {
    out.push_back(node);
    return;
  }
  cover({node.level - 1, 2 * node.index}, wanted, num_leaves, out);
  cover({node.level - 1, 2 * node.index + 1}, wanted, num_leaves, out);
}

}  // namespace

std::int64_t num_leaves_under(TreeNode node, std::int64_t num_leaves) {
  return std::min((node.index + 1) << node.level, num_leaves) - (node.index << node.level);
}

std::vector<TreeNode> covering_nodes(std::int64_t begin, std::int64_t end, std::int64_t num_leaves) {
  check_internal(0 <= begin && begin <= end && end <= num_leaves && num_leaves >= 1, "covering_nodes: bad range");
  std::vector<TreeNode> nodes;
  if (begin < end) cover({top_level(num_leaves), 0}, {begin, end}, num_leaves, nodes);
  return nodes;
}

TreeAccumulator::TreeAccumulator(std::int64_t num_leaves) : num_leaves_(num_leaves), top_level_(0) {
  check_internal(num_leaves >= 1, "TreeAccumulator: a tree needs at least one leaf");
  top_level_ = top_level(num_leaves);
}

void TreeAccumulator::add(TreeNode node, Sum sum) {
  const at::NoGradGuard no_grad;
  check_internal(
      node.level >= 0 && node.level <= top_level_ && node.index >= 0 && (node.index << node.level) < num_leaves_,
      "TreeAccumulator: node outside of the tree");
  while (node.level < top_level_) {
    const std::int64_t sibling = node.index ^ 1;
    const bool sibling_is_empty = (sibling << node.level) >= num_leaves_;
    if (!sibling_is_empty) {
      const auto found = std::find_if(nodes_.begin(), nodes_.end(), [&](const Entry& entry) {
        return entry.first == TreeNode{node.level, sibling};
      });
      if (found == nodes_.end()) break;
      const bool is_left = node.index < sibling;
      Sum other = std::move(found->second);
      nodes_.erase(found);
      if (!is_left) sum.swap(other);
      check_internal(sum.size() == other.size(), "TreeAccumulator: sums of different pieces");
      for (std::size_t i = 0; i < sum.size(); ++i) sum[i].add_(other[i]);
    }
    node = {node.level + 1, node.index >> 1};
  }
  for (const Entry& entry : nodes_) {
    check_internal(!(entry.first == node), "TreeAccumulator: a node was added twice");
  }
  nodes_.emplace_back(node, std::move(sum));
}

bool TreeAccumulator::is_complete() const noexcept {
  return nodes_.size() == 1 && nodes_.front().first == TreeNode{top_level_, 0};
}

TreeAccumulator::Sum TreeAccumulator::take_root() {
  check_internal(is_complete(), "TreeAccumulator: a micro-batch is missing from the sum");
  Sum root = std::move(nodes_.front().second);
  nodes_.clear();
  return root;
}

std::vector<TreeAccumulator::Entry> TreeAccumulator::take_nodes() {
  std::sort(nodes_.begin(), nodes_.end(), [](const Entry& a, const Entry& b) {
    return (a.first.index << a.first.level) < (b.first.index << b.first.level);
  });
  return std::exchange(nodes_, {});
}

std::int64_t TreeAccumulator::num_bytes() const noexcept {
  std::int64_t bytes = 0;
  for (const Entry& entry : nodes_) bytes += num_elements(entry.second) * static_cast<std::int64_t>(sizeof(float));
  return bytes;
}

}  // namespace shardtune
