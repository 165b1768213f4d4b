#include "distributed/comm/collective_operations.hpp"

#include <algorithm>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "core/error.hpp"
#include "distributed/comm/ordered_reduction.hpp"

namespace shardtune::operations {
namespace {

// Up to this many received bytes one all_gather and a sum on every rank beat two rounds of messages.
constexpr std::int64_t kOneRoundBytes = 64 << 10;

std::byte* bytes_of(const at::Tensor& tensor) { return static_cast<std::byte*>(tensor.mutable_data_ptr()); }

std::vector<std::int64_t> in_bytes(Communicator::Counts counts, const at::Tensor& tensor) {
  std::vector<std::int64_t> bytes(counts.begin(), counts.end());
  for (auto& count : bytes) count *= static_cast<std::int64_t>(tensor.element_size());
  return bytes;
}

std::unique_ptr<std::byte[]> make_buffer(std::int64_t bytes) {
  return std::make_unique_for_overwrite<std::byte[]>(static_cast<std::size_t>(bytes));
}

// out := this rank's part of the reduction. Every rank's version of the part is collected, then combined in rank order.
void reduce_own_part(Transport& transport, std::byte* out, const at::Tensor& in, Communicator::Counts counts,
                     ReduceOp op) {
  const auto own = counts[static_cast<std::size_t>(transport.rank())];
  const std::int64_t own_bytes = own * static_cast<std::int64_t>(in.element_size());
  const auto pieces = make_buffer(own_bytes * transport.size());
  const std::vector<std::int64_t> receive_bytes(counts.size(), own_bytes);
  transport.exchange(bytes_of(in), in_bytes(counts, in), pieces.get(), receive_bytes);
  reduce_pieces(pieces.get(), transport.size(), own, in.scalar_type(), op, out);
}

std::string describe(const Fingerprint& print) {
  static constexpr const char* kNames[] = {"all_reduce", "all_gather", "reduce_scatter", "all_to_all",
                                           "broadcast",  "barrier",    "split"};
  std::string text = fmt::format("#{} {}", print.sequence, kNames[print.operation]);
  if (print.dtype >= 0) text += fmt::format(" {}", c10::toString(static_cast<at::ScalarType>(print.dtype)));
  if (print.numel >= 0) text += fmt::format(" [{}]", print.numel);
  if (print.detail != 0) text += fmt::format(" ({:x})", print.detail);
  return text;
}

}  // namespace

void all_reduce(Transport& transport, const at::Tensor& tensor, ReduceOp op) {
  const std::int64_t bytes = static_cast<std::int64_t>(tensor.nbytes());
  const auto size = static_cast<std::size_t>(transport.size());
  if (bytes == 0) return;  // nothing to agree on: the same on every rank
  if (bytes * transport.size() <= kOneRoundBytes) {
    const auto pieces = make_buffer(bytes * transport.size());
    transport.all_gather(bytes_of(tensor), pieces.get(), std::vector<std::int64_t>(size, bytes));
    reduce_pieces(pieces.get(), transport.size(), tensor.numel(), tensor.scalar_type(), op, bytes_of(tensor));
    return;
  }
  // Slices in multiples of a cache line; the tree is element-wise, so the cut does not change any bit.
  constexpr std::int64_t kAlignment = 64;
  const std::int64_t slice = (tensor.numel() / transport.size() / kAlignment + 1) * kAlignment;
  std::vector<std::int64_t> counts(size);
  std::int64_t begin = 0;
  std::int64_t own_begin = 0;
  for (std::size_t r = 0; r < size; ++r) {
    if (static_cast<int>(r) == transport.rank()) own_begin = begin;
    counts[r] = std::min(slice, tensor.numel() - begin);
    begin += counts[r];
  }
  std::byte* own = bytes_of(tensor) + own_begin * static_cast<std::int64_t>(tensor.element_size());
  reduce_own_part(transport, own, tensor, counts, op);
  transport.all_gather(own, bytes_of(tensor), in_bytes(counts, tensor));
}

void all_gather(Transport& transport, const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts) {
  if (out.nbytes() == 0) return;
  transport.all_gather(bytes_of(in), bytes_of(out), in_bytes(counts, in));
}

void reduce_scatter(Transport& transport, const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts) {
  if (in.nbytes() == 0) return;
  reduce_own_part(transport, bytes_of(out), in, counts, ReduceOp::sum);
}

void all_to_all(Transport& transport, const at::Tensor& out, Communicator::Counts out_counts, const at::Tensor& in,
                Communicator::Counts in_counts) {
  transport.exchange(bytes_of(in), in_bytes(in_counts, in), bytes_of(out), in_bytes(out_counts, out));
}

void broadcast(Transport& transport, const at::Tensor& tensor, int root) {
  if (tensor.nbytes() == 0) return;
  transport.broadcast(bytes_of(tensor), static_cast<std::int64_t>(tensor.nbytes()), root);
}

void check_same_on_all_ranks(Transport& transport, const Fingerprint& mine) {
  std::vector<Fingerprint> all(static_cast<std::size_t>(transport.size()));
  const std::vector<std::int64_t> bytes(all.size(), sizeof(Fingerprint));
  transport.all_gather(reinterpret_cast<const std::byte*>(&mine), reinterpret_cast<std::byte*>(all.data()), bytes);
  const bool same = std::all_of(all.begin(), all.end(), [&](const Fingerprint& other) {
    return std::memcmp(&other, &all.front(), sizeof(Fingerprint)) == 0;
  });
  if (same) return;
  std::string message = "the ranks call different collectives:";
  for (std::size_t r = 0; r < all.size(); ++r) message += fmt::format("{} rank {} {}", r ? "," : "", r, describe(all[r]));
  fail(ErrorKind::comm, message);
}

}  // namespace shardtune::operations
