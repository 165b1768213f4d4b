#pragma once
// The Communicator of every multi-rank backend: checks arguments, then hands the operation to its executor.
// Internal to distributed/comm.
#include <functional>
#include <memory>

#include "distributed/comm/collective_operations.hpp"
#include "distributed/comm/communicator.hpp"
#include "distributed/comm/transport.hpp"

namespace shardtune {

class TransportCommunicator final : public Communicator {
 public:
  // check_collectives: before each operation the ranks compare what they are about to do (one small all_gather more);
  // a disagreement is Error{comm} on every rank. Inherited by split().
  TransportCommunicator(std::shared_ptr<Transport> transport, std::shared_ptr<Executor> executor, bool check_collectives);
  // The transport is destroyed on the executor, where it was used.
  ~TransportCommunicator() override;

  int rank() const override { return rank_; }
  int size() const override { return size_; }
  bool runs_on_own_cores() const override { return runs_on_own_cores_; }
  Work all_reduce(at::Tensor tensor, ReduceOp op) override;
  Work all_gather(at::Tensor out, at::Tensor in, Counts counts) override;
  Work reduce_scatter(at::Tensor out, at::Tensor in, Counts counts) override;
  Work all_to_all(at::Tensor out, Counts out_counts, at::Tensor in, Counts in_counts) override;
  Work broadcast(at::Tensor tensor, int root) override;
  void barrier() override;
  at::Tensor make_buffer(std::int64_t numel, at::ScalarType dtype) override;
  at::Tensor make_shared(std::int64_t numel, at::ScalarType dtype) override;
  std::unique_ptr<ProgressBoard> make_progress_board() override;
  std::unique_ptr<Communicator> split(int color, int key) override;

  // For tests. Collective: a part of this group's transport, made by `split` where operations run.
  using Split = std::function<std::unique_ptr<Transport>(Transport&)>;
  std::unique_ptr<Communicator> split_by(const Split& split);
  Transport& transport() const noexcept { return *transport_; }  // only while no operation runs

 private:
  template <class Operation>
  Work submit(operations::Fingerprint fingerprint, Operation operation);
  // Undefined where the transport has no such memory.
  using Make = std::shared_ptr<std::byte> (Transport::*)(std::int64_t);
  at::Tensor make_tensor(operations::Operation operation, Make make, std::int64_t numel, at::ScalarType dtype);

  std::shared_ptr<Transport> transport_;
  std::shared_ptr<Executor> executor_;
  int rank_;
  int size_;
  bool runs_on_own_cores_;
  bool check_collectives_;
  std::int64_t sequence_ = 0;
};

}  // namespace shardtune
