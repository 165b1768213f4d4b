#include "distributed/parallel/tree_exchange.hpp"

#include <algorithm>
#include <bit>
#include <utility>

#include <ATen/ops/empty.h>

namespace shardtune {

std::optional<TreeNode> parent_in_order(const std::vector<std::optional<TreeNode>>& of_ranks, std::int64_t num_leaves) {
  const std::optional<TreeNode>& first = of_ranks.front();
  if (!first) return std::nullopt;
  const auto num_ranks = static_cast<std::int64_t>(of_ranks.size());
  const auto has_same_leaves = [num_leaves](TreeNode a, TreeNode b) {  // nodes at the right end have several labels
    return a.index << a.level == b.index << b.level &&
           num_leaves_under(a, num_leaves) == num_leaves_under(b, num_leaves);
  };
  for (std::int64_t rank = 0; rank < num_ranks; ++rank) {
    const std::optional<TreeNode>& node = of_ranks[static_cast<std::size_t>(rank)];
    if (!node || !has_same_leaves(*node, {first->level, first->index + rank})) return std::nullopt;
  }
  const int height = std::bit_width(static_cast<std::uint64_t>(num_ranks) - 1);
  // Whole subtrees of the height of the ranks' own tree, or all there is at the right end of the canonical one.
  const bool is_aligned = first->index % (std::int64_t{1} << height) == 0;
  const bool is_full =
      num_ranks == std::int64_t{1} << height || ((first->index + num_ranks) << first->level) >= num_leaves;
  if (!is_aligned || !is_full) return std::nullopt;
  return TreeNode{first->level + height, first->index >> height};
}

TreeExchange::TreeExchange(const ReductionAxis& axis, Nodes nodes, std::vector<Pieces> parts)
    : axis_(axis),
      nodes_(std::move(nodes)),
      parts_(std::move(parts)),
      per_rank_(axis_.buckets.numel_per_rank(nodes_.dtype)),
      num_chunks_(num_chunks(axis_.counts, per_rank_)),
      own_count_(axis_.counts[static_cast<std::size_t>(axis_.ranks.rank())]),
      // reduce_scatter rounds sums of bf16 to bf16.
      parent_(nodes_.dtype == at::kFloat ? parent_in_order(nodes_.of_ranks, nodes_.num_leaves) : std::nullopt),
      stream_(axis_.buckets, num_chunks_,
              {.start = [this](std::int64_t chunk, const at::Tensor& bucket) { return start(chunk, bucket); },
               .finish = [this](std::int64_t chunk, const at::Tensor&) { finish_chunk(chunk); }}) {
  stream_.start_all();
}

TreeExchange::~TreeExchange() {
  stream_.drop();
  for (at::Tensor& bucket : received_) axis_.buckets.give_back(std::move(bucket));
}

// Where this rank's part of a chunk belongs in a whole sum.
at::Tensor TreeExchange::own_part(at::Tensor sum, std::int64_t chunk) const {
  const std::int64_t begin = std::min(chunk * per_rank_, own_count_);
  return sum.narrow(0, begin, std::min(per_rank_, own_count_ - begin));
}

Work TreeExchange::start(std::int64_t chunk, const at::Tensor& bucket) {
  const std::vector<std::int64_t> counts = counts_of_chunk(axis_.counts, chunk, per_rank_);
  const bool has_node = !parts_.empty();
  const std::vector<std::int64_t> in_counts = has_node ? counts : std::vector<std::int64_t>(counts.size(), 0);
  const at::Tensor in_bucket = bucket.view(nodes_.dtype);
  const Pieces places = split_bucket(in_bucket, in_counts);
  for (std::size_t rank = 0; has_node && rank < places.size(); ++rank) {
    copy_out(parts_[rank], chunk * per_rank_, places[rank]);
  }
  if (chunk + 1 == num_chunks_) parts_.clear();
  const at::Tensor in = in_bucket.narrow(0, 0, num_elements(places));
  if (parent_) return start_reduce_scatter(chunk, in, counts);
  received_.push_back(axis_.buckets.take());
  std::vector<std::int64_t> out_counts;
  std::int64_t num_received = 0;
  for (const auto& node : nodes_.of_ranks) {
    out_counts.push_back(node ? counts[static_cast<std::size_t>(axis_.ranks.rank())] : 0);
    num_received += out_counts.back();
  }
  const at::Tensor out = received_.back().view(nodes_.dtype).narrow(0, 0, num_received);
  return axis_.ranks.all_to_all(out, out_counts, in, in_counts);
}

Work TreeExchange::start_reduce_scatter(std::int64_t chunk, const at::Tensor& in,
                                        const std::vector<std::int64_t>& counts) {
  if (sums_.empty()) sums_.push_back({*parent_, {at::empty({own_count_}, at::kFloat)}});
  return axis_.ranks.reduce_scatter(own_part(sums_.front().second.front(), chunk), in, counts);
}

void TreeExchange::finish_chunk(std::int64_t chunk) {
  if (parent_) return;
  const at::Tensor received = received_.front().view(nodes_.dtype);
  const std::int64_t count = counts_of_chunk({own_count_}, chunk, per_rank_).front();
  TreeAccumulator tree(nodes_.num_leaves);
  std::int64_t at_element = 0;
  for (const auto& node : nodes_.of_ranks) {
    if (!node) continue;
    tree.add(*node, {received.narrow(0, at_element, count).to(at::kFloat)});
    at_element += count;
  }
  const std::vector<TreeAccumulator::Entry> in_chunk = tree.take_nodes();
  for (std::size_t i = 0; i < in_chunk.size(); ++i) {
    if (chunk == 0) sums_.push_back({in_chunk[i].first, {at::empty({own_count_}, at::kFloat)}});
    own_part(sums_[i].second.front(), chunk).copy_(in_chunk[i].second.front());
  }
  axis_.buckets.give_back(std::move(received_.front()));
  received_.pop_front();
}

std::vector<TreeAccumulator::Entry> TreeExchange::finish() {
  stream_.finish();
  return std::exchange(sums_, {});
}

std::int64_t TreeExchange::num_bytes() const noexcept {
  return static_cast<std::int64_t>(sums_.size()) * own_count_ * static_cast<std::int64_t>(sizeof(float));
}

}  // namespace shardtune
