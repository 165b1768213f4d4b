#include "distributed/comm/hierarchical_transport.hpp"

#include <utility>
#include <vector>

#include <fmt/format.h>

namespace shardtune {
namespace {

Reduction partial(Reduction reduction) {
  reduction.is_partial = true;
  return reduction;
}

// Of partial results.
Reduction second_level(const Reduction& reduction) { return {partial(reduction).out_dtype(), reduction.op}; }

}  // namespace

HierarchicalTransport::HierarchicalTransport(std::unique_ptr<Transport> messages, const LayerOptions& options,
                                             std::unique_ptr<Transport> within, std::unique_ptr<Transport> across)
    : LayeredTransport(std::move(messages), options, /*is_one_node=*/false),
      within_(std::move(within)),
      across_(std::move(across)) {}

Transport::Counts HierarchicalTransport::of_node(Counts counts, int node) const {
  const auto node_size = static_cast<std::size_t>(within_->size());
  return counts.subspan(static_cast<std::size_t>(node) * node_size, node_size);
}

std::vector<std::int64_t> HierarchicalTransport::of_place(Counts counts) const {
  std::vector<std::int64_t> result;
  for (int node = 0; node < across_->size(); ++node) {
    result.push_back(of_node(counts, node)[static_cast<std::size_t>(within_->rank())]);
  }
  return result;
}

std::string HierarchicalTransport::describe() const {
  return fmt::format("{} nodes of {} ranks: {} within, {} across", across_->size(), within_->size(),
                     within_->describe(), across_->describe());
}

void HierarchicalTransport::barrier() {
  within_->barrier();
  if (within_->rank() == 0) across_->barrier();
  within_->barrier();
}

void HierarchicalTransport::broadcast(std::byte* data, std::int64_t bytes, int root) {
  const int place = root % within_->size();
  if (within_->rank() == place) across_->broadcast(data, bytes, root / within_->size());
  within_->broadcast(data, bytes, place);
}

// Each rank fetches what the ranks of its place have, then the ranks of a node pool what they fetched.
void HierarchicalTransport::all_gather(const std::byte* send, std::byte* receive, Counts bytes) {
  const std::vector<std::int64_t> at = offsets_of(bytes);
  const std::vector<std::int64_t> fetched_bytes = of_place(bytes);
  const std::vector<std::int64_t> fetched_at = offsets_of(fetched_bytes);
  const auto fetched = make_scratch(fetched_at.back());
  across_->all_gather(send, fetched.get(), fetched_bytes);
  for (int node = 0; node < across_->size(); ++node) {
    within_->all_gather(fetched.get() + fetched_at[static_cast<std::size_t>(node)],
                        receive + at[static_cast<std::size_t>(node * within_->size())], of_node(bytes, node));
  }
}

void HierarchicalTransport::all_reduce(std::byte* data, std::int64_t numel, const Reduction& reduction) {
  const std::vector<std::int64_t> slices = even_slices(numel, within_->size());
  const auto place = static_cast<std::size_t>(within_->rank());
  std::byte* own = data + offsets_of(slices)[place] * reduction.in_bytes();
  const Reduction first = partial(reduction);
  const Reduction second = second_level(reduction);
  const auto scratch = make_scratch(slices[place] * first.out_bytes());
  within_->reduce_scatter(data, slices, scratch.get(), first);
  across_->all_reduce(scratch.get(), slices[place], second);
  finish_partial(scratch.get(), slices[place], first, own);
  within_->all_gather(own, data, scaled(slices, reduction.in_bytes()));
}

// Every node sums its own versions of all parts, each rank those of the ranks of its place; these then sum over nodes.
void HierarchicalTransport::reduce_scatter(const std::byte* in, Counts numels, std::byte* out,
                                           const Reduction& reduction) {
  const std::vector<std::int64_t> at = offsets_of(numels);
  const std::vector<std::int64_t> place_numels = of_place(numels);
  const std::vector<std::int64_t> place_at = offsets_of(place_numels);
  const Reduction first = partial(reduction);
  const std::int64_t element = first.out_bytes();
  const auto sums = make_scratch(place_at.back() * element);
  for (int node = 0; node < across_->size(); ++node) {
    within_->reduce_scatter(in + at[static_cast<std::size_t>(node * within_->size())] * reduction.in_bytes(),
                            of_node(numels, node), sums.get() + place_at[static_cast<std::size_t>(node)] * element,
                            first);
  }
  const std::int64_t own_numel = place_numels[static_cast<std::size_t>(across_->rank())];
  const auto own = make_scratch(own_numel * element);
  across_->reduce_scatter(sums.get(), place_numels, own.get(), second_level(reduction));
  finish_partial(own.get(), own_numel, reduction.is_partial ? second_level(reduction) : first, out);
}

}  // namespace shardtune
