#include "distributed/comm/transport_communicator.hpp"

#include <utility>
#include <vector>

#include <ATen/ops/from_blob.h>

#include "core/hash.hpp"
#include "distributed/comm/argument_checks.hpp"

namespace shardtune {
namespace {

using operations::Fingerprint;
using operations::Operation;

Fingerprint fingerprint_of(Operation operation, const at::Tensor& tensor, std::int64_t numel, std::int64_t detail) {
  return {0, static_cast<std::int64_t>(operation), static_cast<std::int64_t>(tensor.scalar_type()), numel, detail};
}

Fingerprint fingerprint_of(Operation operation) { return {0, static_cast<std::int64_t>(operation), -1, -1, 0}; }

std::int64_t hash_of(Communicator::Counts counts) {
  return static_cast<std::int64_t>(hash_bytes(counts.data(), counts.size_bytes()));
}

std::vector<std::int64_t> copy_of(Communicator::Counts counts) { return {counts.begin(), counts.end()}; }

}  // namespace

TransportCommunicator::TransportCommunicator(std::shared_ptr<Transport> transport, std::shared_ptr<Executor> executor,
                                             bool check_collectives)
    : transport_(std::move(transport)),
      executor_(std::move(executor)),
      rank_(transport_->rank()),
      size_(transport_->size()),
      runs_on_own_cores_(transport_->runs_on_own_cores()),
      check_collectives_(check_collectives) {}

TransportCommunicator::~TransportCommunicator() { executor_->dispose(std::move(transport_)); }

template <class Operation>
Work TransportCommunicator::submit(Fingerprint fingerprint, Operation operation) {
  fingerprint.sequence = sequence_++;
  return executor_->submit(
      [fingerprint, check = check_collectives_, transport = transport_, operation = std::move(operation)] {
        if (check) operations::check_same_on_all_ranks(*transport, fingerprint);
        operation(*transport);
      });
}

Work TransportCommunicator::all_reduce(at::Tensor tensor, ReduceOp op) {
  check_all_reduce(tensor, op);
  const auto print = fingerprint_of(Operation::all_reduce, tensor, tensor.numel(), static_cast<std::int64_t>(op));
  return submit(print, [tensor = std::move(tensor), op](Transport& transport) {
    operations::all_reduce(transport, tensor, op);
  });
}

Work TransportCommunicator::all_gather(at::Tensor out, at::Tensor in, Counts counts) {
  check_all_gather(out, in, counts, rank_, size_);
  const auto print = fingerprint_of(Operation::all_gather, out, out.numel(), hash_of(counts));
  return submit(print, [out = std::move(out), in = std::move(in), counts = copy_of(counts)](Transport& transport) {
    operations::all_gather(transport, out, in, counts);
  });
}

Work TransportCommunicator::reduce_scatter(at::Tensor out, at::Tensor in, Counts counts) {
  check_reduce_scatter(out, in, counts, rank_, size_);
  const auto print = fingerprint_of(Operation::reduce_scatter, in, in.numel(), hash_of(counts));
  return submit(print, [out = std::move(out), in = std::move(in), counts = copy_of(counts)](Transport& transport) {
    operations::reduce_scatter(transport, out, in, counts);
  });
}

Work TransportCommunicator::all_to_all(at::Tensor out, Counts out_counts, at::Tensor in, Counts in_counts) {
  check_all_to_all({out, out_counts, in, in_counts}, rank_, size_);
  const auto print = fingerprint_of(Operation::all_to_all, in, -1, 0);
  return submit(print, [out = std::move(out), in = std::move(in), out_counts = copy_of(out_counts),
                        in_counts = copy_of(in_counts)](Transport& transport) {
    operations::all_to_all(transport, out, out_counts, in, in_counts);
  });
}

Work TransportCommunicator::broadcast(at::Tensor tensor, int root) {
  check_broadcast(tensor, root, size_);
  const auto print = fingerprint_of(Operation::broadcast, tensor, tensor.numel(), root);
  return submit(print, [tensor = std::move(tensor), root](Transport& transport) {
    operations::broadcast(transport, tensor, root);
  });
}

void TransportCommunicator::barrier() {
  submit(fingerprint_of(Operation::barrier), [](Transport& transport) { transport.barrier(); }).wait();
}

at::Tensor TransportCommunicator::make_tensor(Operation operation, Make make, std::int64_t numel,
                                              at::ScalarType dtype) {
  const auto bytes = numel * static_cast<std::int64_t>(c10::elementSize(dtype));
  std::shared_ptr<std::byte> memory;
  Fingerprint print = fingerprint_of(operation);
  print.numel = bytes;
  submit(print, [&memory, make, bytes](Transport& transport) {
    if (bytes > 0) memory = (transport.*make)(bytes);
  }).wait();
  if (!memory) return {};
  void* data = memory.get();
  return at::from_blob(
      data, {numel}, [memory = std::move(memory)](void*) mutable { memory.reset(); }, dtype);
}

at::Tensor TransportCommunicator::make_buffer(std::int64_t numel, at::ScalarType dtype) {
  check_make_buffer(numel, dtype);
  const at::Tensor made = make_tensor(Operation::make_buffer, &Transport::make_buffer, numel, dtype);
  return made.defined() ? made : Communicator::make_buffer(numel, dtype);
}

at::Tensor TransportCommunicator::make_shared(std::int64_t numel, at::ScalarType dtype) {
  check_make_buffer(numel, dtype);
  return make_tensor(Operation::make_shared, &Transport::make_shared, numel, dtype);
}

std::unique_ptr<ProgressBoard> TransportCommunicator::make_progress_board() {
  std::unique_ptr<ProgressBoard> board;
  submit(fingerprint_of(Operation::make_progress_board), [&board](Transport& transport) {
    board = transport.make_progress_board();
  }).wait();
  return board;
}

std::unique_ptr<Communicator> TransportCommunicator::split(int color, int key) {
  check_split(color);
  return split_by([color, key](Transport& transport) { return transport.split(color, key); });
}

std::unique_ptr<Communicator> TransportCommunicator::split_by(const Split& split) {
  std::shared_ptr<Transport> part;
  submit(fingerprint_of(Operation::split), [&part, &split](Transport& transport) {
    part = split(transport);
    if (part->size() == 1) part.reset();
  }).wait();
  if (!part) return make_self_communicator();
  return std::make_unique<TransportCommunicator>(std::move(part), executor_, check_collectives_);
}

}  // namespace shardtune
