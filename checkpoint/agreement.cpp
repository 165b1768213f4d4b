#include "checkpoint/agreement.hpp"

#include <cstring>
#include <numeric>

#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <fmt/format.h>

#include "core/error.hpp"
#include "distributed/comm/exchange.hpp"

namespace shardtune {

void run_agreed(Communicator& communicator, const std::string& what, const std::function<void()>& step) {
  std::string outcome;  // empty, or one character for the kind and the message
  try {
    step();
  } catch (const Error& e) {
    outcome = static_cast<char>('0' + static_cast<int>(e.kind())) + std::string(e.what());
  } catch (const std::exception& e) {
    outcome = static_cast<char>('0' + static_cast<int>(ErrorKind::io)) + std::string(e.what());
  }
  const std::vector<std::string> outcomes = all_gather_strings(communicator, outcome);
  std::size_t num_failed = 0, first = outcomes.size();
  for (std::size_t rank = outcomes.size(); rank-- > 0;)
    if (!outcomes[rank].empty()) ++num_failed, first = rank;
  if (num_failed == 0) return;
  const std::string others = num_failed > 1 ? fmt::format(" (and on {} other ranks)", num_failed - 1) : "";
  fail(static_cast<ErrorKind>(outcomes[first][0] - '0'),
       fmt::format("{} failed on rank {}{}: {}", what, first, others, outcomes[first].substr(1)));
}

std::vector<std::string> gather_strings(Communicator& communicator, const std::string& text, int root) {
  const auto num_ranks = static_cast<std::size_t>(communicator.size());
  const bool is_root = communicator.rank() == root;
  const auto text_bytes = static_cast<std::int64_t>(text.size());
  at::Tensor sizes = at::empty({communicator.size()}, at::kLong);
  communicator.all_gather(sizes, at::full({1}, text_bytes, at::kLong), std::vector<std::int64_t>(num_ranks, 1)).wait();
  std::vector<std::int64_t> out_counts(num_ranks, 0), in_counts(num_ranks, 0);
  in_counts[static_cast<std::size_t>(root)] = text_bytes;
  if (is_root) std::memcpy(out_counts.data(), sizes.data_ptr(), num_ranks * sizeof(std::int64_t));
  at::Tensor in = at::empty({text_bytes}, at::kByte);
  if (!text.empty()) std::memcpy(in.data_ptr(), text.data(), text.size());
  at::Tensor out = at::empty({std::accumulate(out_counts.begin(), out_counts.end(), std::int64_t{0})}, at::kByte);
  communicator.all_to_all(out, out_counts, in, in_counts).wait();
  std::vector<std::string> result;
  const auto* bytes = static_cast<const char*>(out.data_ptr());
  for (std::size_t rank = 0; is_root && rank < num_ranks; ++rank) {
    result.emplace_back(bytes, static_cast<std::size_t>(out_counts[rank]));
    bytes += out_counts[rank];
  }
  return result;
}

}  // namespace shardtune
