#include <string>
#include <vector>

#include <ATen/ATen.h>

#include "benchmarks/collectives/contestant.hpp"
#include "distributed/comm/transport_seams.hpp"

namespace shardtune::benchmark {
namespace {

class OwnContestant final : public Contestant {
 public:
  OwnContestant(Communicator& world, const OwnOptions& options, std::int64_t max_bytes)
      : world_(world), options_(options), transport_(*transport_of(world)) {
    if (!options.in_buffers) return;
    in_buffer_ = world.make_buffer(max_bytes, at::kByte);
    out_buffer_ = world.make_buffer(max_bytes, at::kByte);
  }

  std::string name() const override {
    return std::string("own") + (options_.in_buffers ? ", in buffers" : "") + (options_.is_direct ? ", direct" : "");
  }

  void prepare(const Case& c) override {
    case_ = c;
    counts_.assign(static_cast<std::size_t>(world_.size()), c.numel / world_.size());
    byte_counts_ = counts_;
    for (auto& count : byte_counts_) count *= static_cast<std::int64_t>(c10::elementSize(c.dtype));
    if (!options_.in_buffers) return allocate(c, world_.size());
    in_ = view(in_buffer_, in_numel(c, world_.size()));
    out_ = c.operation == Operation::all_reduce ? in_ : view(out_buffer_, out_numel(c, world_.size()));
  }

  void run() override {
    if (options_.is_direct) return run_directly();
    switch (case_.operation) {
      case Operation::all_reduce: return world_.all_reduce(in_, ReduceOp::sum).wait();
      case Operation::reduce_scatter: return world_.reduce_scatter(out_, in_, counts_).wait();
      case Operation::all_gather: return world_.all_gather(out_, in_, counts_).wait();
      case Operation::all_to_all: return world_.all_to_all(out_, counts_, in_, counts_).wait();
    }
  }

 private:
  void run_directly() {
    auto* const in = static_cast<std::byte*>(in_.mutable_data_ptr());
    auto* const out = static_cast<std::byte*>(out_.mutable_data_ptr());
    const Reduction sum{case_.dtype, ReduceOp::sum};
    switch (case_.operation) {
      case Operation::all_reduce: return transport_.all_reduce(in, case_.numel, sum);
      case Operation::reduce_scatter: return transport_.reduce_scatter(in, counts_, out, sum);
      case Operation::all_gather: return transport_.all_gather(in, out, byte_counts_);
      case Operation::all_to_all: return transport_.exchange(in, byte_counts_, out, byte_counts_);
    }
  }

  at::Tensor view(const at::Tensor& buffer, std::int64_t numel) const {
    return buffer.narrow(0, 0, numel * static_cast<std::int64_t>(c10::elementSize(case_.dtype))).view(case_.dtype);
  }

  Communicator& world_;
  OwnOptions options_;
  Transport& transport_;
  Case case_{};
  std::vector<std::int64_t> counts_;
  std::vector<std::int64_t> byte_counts_;
  at::Tensor in_buffer_;
  at::Tensor out_buffer_;
};

}  // namespace

std::int64_t in_numel(const Case& c, int num_ranks) {
  return c.operation == Operation::all_gather ? c.numel / num_ranks : c.numel;
}

std::int64_t out_numel(const Case& c, int num_ranks) {
  return c.operation == Operation::reduce_scatter ? c.numel / num_ranks : c.numel;
}

void Contestant::allocate(const Case& c, int num_ranks) {
  in_ = at::zeros({in_numel(c, num_ranks)}, c.dtype);
  out_ = c.operation == Operation::all_reduce ? in_ : at::zeros({out_numel(c, num_ranks)}, c.dtype);
}

std::unique_ptr<Contestant> make_own_contestant(Communicator& world, const OwnOptions& options,
                                                std::int64_t max_bytes) {
  return std::make_unique<OwnContestant>(world, options, max_bytes);
}

}  // namespace shardtune::benchmark
