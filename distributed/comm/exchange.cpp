#include "distributed/comm/exchange.hpp"

#include <cstring>
#include <numeric>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>

namespace shardtune {
namespace {

at::Tensor to_bytes(const std::string& text) {
  at::Tensor bytes = at::empty({static_cast<std::int64_t>(text.size())}, at::kByte);
  if (!text.empty()) std::memcpy(bytes.data_ptr(), text.data(), text.size());
  return bytes;
}

}  // namespace

std::vector<std::string> all_gather_strings(Communicator& communicator, const std::string& text) {
  const auto num_ranks = static_cast<std::size_t>(communicator.size());
  at::Tensor sizes = at::empty({communicator.size()}, at::kLong);
  const std::vector<std::int64_t> ones(num_ranks, 1);
  communicator.all_gather(sizes, at::full({1}, static_cast<std::int64_t>(text.size()), at::kLong), ones).wait();
  const auto* counts = sizes.data_ptr<std::int64_t>();
  const std::vector<std::int64_t> per_rank(counts, counts + num_ranks);
  at::Tensor all = at::empty({std::accumulate(per_rank.begin(), per_rank.end(), std::int64_t{0})}, at::kByte);
  communicator.all_gather(all, to_bytes(text), per_rank).wait();
  std::vector<std::string> result;
  const auto* bytes = static_cast<const char*>(all.data_ptr());
  for (const std::int64_t count : per_rank) {
    result.emplace_back(bytes, static_cast<std::size_t>(count));
    bytes += count;
  }
  return result;
}

std::string broadcast_string(Communicator& communicator, const std::string& text, int root) {
  at::Tensor size = at::full({1}, static_cast<std::int64_t>(text.size()), at::kLong);
  communicator.broadcast(size, root).wait();
  at::Tensor bytes = communicator.rank() == root ? to_bytes(text) : at::empty({size.item<std::int64_t>()}, at::kByte);
  communicator.broadcast(bytes, root).wait();
  return std::string(static_cast<const char*>(bytes.data_ptr()), static_cast<std::size_t>(bytes.numel()));
}

}  // namespace shardtune
