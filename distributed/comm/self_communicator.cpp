#include <cstring>

#include <ATen/ops/empty.h>

#include "distributed/comm/argument_checks.hpp"
#include "distributed/comm/communicator.hpp"

namespace shardtune {
namespace {

void copy_bytes(const at::Tensor& out, const at::Tensor& in) {
  if (in.nbytes() > 0) std::memmove(out.mutable_data_ptr(), in.const_data_ptr(), in.nbytes());
}

class SelfProgressBoard final : public ProgressBoard {
 public:
  void publish(std::int64_t /*step*/) override {}
  void wait_for_all(std::int64_t /*step*/) override {}
};

class SelfCommunicator final : public Communicator {
 public:
  int rank() const override { return 0; }
  int size() const override { return 1; }
  bool runs_on_own_cores() const override { return true; }

  Work all_reduce(at::Tensor tensor, ReduceOp op) override {
    check_all_reduce(tensor, op);
    return {};
  }
  Work all_gather(at::Tensor out, at::Tensor in, Counts counts) override {
    check_all_gather(out, in, counts, 0, 1);
    copy_bytes(out, in);
    return {};
  }
  Work reduce_scatter(at::Tensor out, at::Tensor in, Counts counts) override {
    check_reduce_scatter(out, in, counts, 0, 1);
    copy_bytes(out, in);
    return {};
  }
  Work all_to_all(at::Tensor out, Counts out_counts, at::Tensor in, Counts in_counts) override {
    check_all_to_all({out, out_counts, in, in_counts}, 0, 1);
    copy_bytes(out, in);
    return {};
  }
  Work broadcast(at::Tensor tensor, int root) override {
    check_broadcast(tensor, root, 1);
    return {};
  }
  void barrier() override {}
  at::Tensor make_shared(std::int64_t numel, at::ScalarType dtype) override { return make_buffer(numel, dtype); }
  std::unique_ptr<ProgressBoard> make_progress_board() override { return std::make_unique<SelfProgressBoard>(); }
  std::unique_ptr<Communicator> split(int color, int /*key*/) override {
    check_split(color);
    return make_self_communicator();
  }
};

}  // namespace

at::Tensor Communicator::make_buffer(std::int64_t numel, at::ScalarType dtype) {
  check_make_buffer(numel, dtype);
  return at::empty({numel}, dtype);
}

at::Tensor Communicator::make_shared(std::int64_t numel, at::ScalarType dtype) {
  check_make_buffer(numel, dtype);
  return {};
}

std::unique_ptr<ProgressBoard> Communicator::make_progress_board() { return nullptr; }

std::unique_ptr<Communicator> make_self_communicator() { return std::make_unique<SelfCommunicator>(); }

}  // namespace shardtune
