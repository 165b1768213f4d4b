#include <vector>

#include <ATen/ATen.h>
#include <torch/csrc/distributed/c10d/FileStore.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroupGloo.hpp>

#include "benchmarks/collectives/contestant.hpp"

namespace shardtune::benchmark {
namespace {

class GlooContestant final : public Contestant {
 public:
  GlooContestant(int rank, int num_ranks, const std::string& file) : num_ranks_(num_ranks) {
    auto options = c10d::ProcessGroupGloo::Options::create();
    options->devices.push_back(c10d::ProcessGroupGloo::createDeviceForHostname("127.0.0.1"));
    auto store = c10::make_intrusive<c10d::FileStore>(file, num_ranks);
    group_ = c10::make_intrusive<c10d::ProcessGroupGloo>(store, rank, num_ranks, options);
  }

  std::string name() const override { return "gloo"; }

  void prepare(const Case& c) override {
    case_ = c;
    allocate(c, num_ranks_);
  }

  void run() override { (void)start()->wait(); }

 private:
  c10::intrusive_ptr<c10d::Work> start() {
    std::vector<at::Tensor> tensors = {in_};
    std::vector<std::int64_t> even;  // equal parts
    switch (case_.operation) {
      case Operation::all_reduce: return group_->allreduce(tensors);
      case Operation::reduce_scatter: return group_->_reduce_scatter_base(out_, in_);
      case Operation::all_gather: return group_->_allgather_base(out_, in_);
      case Operation::all_to_all: return group_->alltoall_base(out_, in_, even, even);
    }
    return nullptr;
  }

  int num_ranks_;
  Case case_{};
  c10::intrusive_ptr<c10d::Backend> group_;
};

}  // namespace

std::unique_ptr<Contestant> make_gloo_contestant(int rank, int num_ranks, const std::string& file) {
  return std::make_unique<GlooContestant>(rank, num_ranks, file);
}

}  // namespace shardtune::benchmark
