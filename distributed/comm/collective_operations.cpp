#include "distributed/comm/collective_operations.hpp"

#include <algorithm>
#include <cstring>
#include <string>
#include <vector>

#include <fmt/format.h>

#include "core/error.hpp"

namespace shardtune::operations {
namespace {

std::byte* bytes_of(const at::Tensor& tensor) { return static_cast<std::byte*>(tensor.mutable_data_ptr()); }

std::vector<std::int64_t> in_bytes(Communicator::Counts counts, const at::Tensor& tensor) {
  return scaled(counts, static_cast<std::int64_t>(tensor.element_size()));
}

std::string describe(const Fingerprint& print) {
  static constexpr const char* kNames[] = {
      "all_reduce", "all_gather", "reduce_scatter", "all_to_all",  "broadcast",
      "barrier",    "split",      "make_buffer",    "make_shared", "make_progress_board"};
  std::string text = fmt::format("#{} {}", print.sequence, kNames[print.operation]);
  if (print.dtype >= 0) text += fmt::format(" {}", c10::toString(static_cast<at::ScalarType>(print.dtype)));
  if (print.numel >= 0) text += fmt::format(" [{}]", print.numel);
  if (print.detail != 0) text += fmt::format(" ({:x})", print.detail);
  return text;
}

}  // namespace

void all_reduce(Transport& transport, const at::Tensor& tensor, ReduceOp op) {
  if (tensor.nbytes() == 0) return;  // nothing to agree on: the same on every rank
  transport.all_reduce(bytes_of(tensor), tensor.numel(), {tensor.scalar_type(), op});
}

void all_gather(Transport& transport, const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts) {
  if (out.nbytes() == 0) return;
  transport.all_gather(bytes_of(in), bytes_of(out), in_bytes(counts, in));
}

void reduce_scatter(Transport& transport, const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts) {
  if (in.nbytes() == 0) return;
  transport.reduce_scatter(bytes_of(in), counts, bytes_of(out), {in.scalar_type(), ReduceOp::sum});
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
