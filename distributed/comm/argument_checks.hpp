#pragma once
// What every backend demands of the arguments of a collective before anything is sent: broken demands are our bugs,
// Error{internal} naming the operation, the argument and its value. Thread-safe. Internal to distributed/comm.
#include "distributed/comm/communicator.hpp"

namespace shardtune {

const char* to_string(ReduceOp op) noexcept;

void check_all_reduce(const at::Tensor& tensor, ReduceOp op);
void check_all_gather(const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts, int rank, int size);
void check_reduce_scatter(const at::Tensor& out, const at::Tensor& in, Communicator::Counts counts, int rank, int size);
struct AllToAllArguments {
  const at::Tensor& out;
  Communicator::Counts out_counts;
  const at::Tensor& in;
  Communicator::Counts in_counts;
};
void check_all_to_all(const AllToAllArguments& arguments, int rank, int size);
void check_broadcast(const at::Tensor& tensor, int root, int size);
void check_make_buffer(std::int64_t numel, at::ScalarType dtype);
void check_split(int color);

}  // namespace shardtune
