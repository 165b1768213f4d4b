#include <array>
#include <stdexcept>

#include <ATen/ATen.h>
#include <mpi.h>

#include "benchmarks/collectives/contestant.hpp"
#include "distributed/comm/ordered_reduction.hpp"

namespace shardtune::benchmark {
namespace {

void check(int code) {
  if (code != MPI_SUCCESS) throw std::runtime_error("an MPI call has failed");
}

// MPI knows no bf16: its sum in fp32, vectorised as our own.
void add_bf16(void* in, void* in_out, int* count, MPI_Datatype* /*type*/) {
  const std::array pieces = {static_cast<const std::byte*>(in), static_cast<const std::byte*>(in_out)};
  reduce_pieces(pieces, *count, {at::kBFloat16, ReduceOp::sum}, static_cast<std::byte*>(in_out));
}

class MpiContestant final : public Contestant {
 public:
  explicit MpiContestant(int num_ranks) : num_ranks_(num_ranks) {
    check(MPI_Op_create(add_bf16, /*commute=*/1, &add_bf16_));
  }
  ~MpiContestant() override { (void)MPI_Op_free(&add_bf16_); }

  std::string name() const override { return "Open MPI"; }

  void prepare(const Case& c) override {
    case_ = c;
    allocate(c, num_ranks_);
  }

  void run() override {
    const bool is_bf16 = case_.dtype == at::kBFloat16;
    MPI_Datatype const type = is_bf16 ? MPI_UINT16_T : MPI_FLOAT;
    MPI_Op const sum = is_bf16 ? add_bf16_ : MPI_SUM;
    const int all = static_cast<int>(case_.numel);
    const int part = all / num_ranks_;
    void* in = in_.mutable_data_ptr();
    void* out = out_.mutable_data_ptr();
    switch (case_.operation) {
      case Operation::all_reduce: return check(MPI_Allreduce(MPI_IN_PLACE, in, all, type, sum, MPI_COMM_WORLD));
      case Operation::reduce_scatter: return check(MPI_Reduce_scatter_block(in, out, part, type, sum, MPI_COMM_WORLD));
      case Operation::all_gather: return check(MPI_Allgather(in, part, type, out, part, type, MPI_COMM_WORLD));
      case Operation::all_to_all: return check(MPI_Alltoall(in, part, type, out, part, type, MPI_COMM_WORLD));
    }
  }

 private:
  int num_ranks_;
  Case case_{};
  MPI_Op add_bf16_ = MPI_OP_NULL;
};

}  // namespace

std::unique_ptr<Contestant> make_mpi_contestant(int num_ranks) { return std::make_unique<MpiContestant>(num_ranks); }

}  // namespace shardtune::benchmark
