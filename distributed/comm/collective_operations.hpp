#pragma once
// The collectives of communicator.hpp over a Transport: tensors in, bytes out; blocking, arguments already checked.
// Internal to distributed/comm.
#include "distributed/comm/communicator.hpp"
#include "distributed/comm/transport.hpp"

namespace shardtune::operations {

void all_reduce(Transport& transport, const at::Tensor& tensor, ReduceOp op);
void all_gather(Transport& transport, const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts);
void reduce_scatter(Transport& transport, const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts);
void all_to_all(Transport& transport, const at::Tensor& out, Communicator::Counts out_counts, const at::Tensor& in,
                Communicator::Counts in_counts);
void broadcast(Transport& transport, const at::Tensor& tensor, int root);

// What a rank is about to do, compared across ranks by the mismatch guard.
struct Fingerprint {
  std::int64_t sequence;   // operations on this communicator so far
  std::int64_t operation;  // enum Operation
  std::int64_t dtype;      // at::ScalarType, -1 without a tensor
  std::int64_t numel;      // elements that all ranks must agree on, -1 where they may differ
  std::int64_t detail;     // root, reduction or hash of the counts
};
enum class Operation {
  all_reduce,
  all_gather,
  reduce_scatter,
  all_to_all,
  broadcast,
  barrier,
  split,
  make_buffer,
  make_shared,
  make_progress_board
};

// Error{comm} naming ranks and operations, on every rank, when the ranks do not all bring the same fingerprint.
void check_same_on_all_ranks(Transport& transport, const Fingerprint& mine);

}  // namespace shardtune::operations
