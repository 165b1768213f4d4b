// GoogleTest main under mpirun: all ranks run all tests, and the exit status of each rank tells of failures on any.
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>

#include <ATen/ops/tensor.h>
#include <gtest/gtest.h>

#include "distributed/comm/mpi.hpp"
#include "tests/support/mpi_test.hpp"

namespace shardtune {
namespace {

Communicator* the_world = nullptr;

// What ranks other than 0 print instead of the full output.
class FailurePrinter final : public testing::EmptyTestEventListener {
 public:
  explicit FailurePrinter(int rank) : rank_(rank) {}
  void OnTestPartResult(const testing::TestPartResult& result) override {
    if (!result.failed()) return;
    std::fprintf(stderr, "rank %d: %s:%d: %s\n", rank_, result.file_name() != nullptr ? result.file_name() : "?",
                 result.line_number(), result.message());
  }

 private:
  int rank_;
};

int run_tests(MpiEnvironment& environment) {
  const std::unique_ptr<Communicator> world = environment.world();
  the_world = world.get();
  const auto* tests = testing::UnitTest::GetInstance();
  if (world->rank() != 0) {
    auto& listeners = testing::UnitTest::GetInstance()->listeners();
    delete listeners.Release(listeners.default_result_printer());
    listeners.Append(new FailurePrinter(world->rank()));  // GoogleTest takes ownership
  }
  const bool has_failed = RUN_ALL_TESTS() != 0;
  const int num_checked = tests->successful_test_count() + tests->failed_test_count();
  if (num_checked == 0) std::fprintf(stderr, "rank %d ran no test\n", world->rank());
  at::Tensor verdict = at::tensor({static_cast<std::int64_t>(has_failed), static_cast<std::int64_t>(num_checked == 0)});
  world->all_reduce(verdict, ReduceOp::max).wait();
  the_world = nullptr;
  return verdict.max().item<std::int64_t>() == 0 ? 0 : 1;
}

}  // namespace

Communicator& mpi_world() {
  if (the_world == nullptr) {
    std::fprintf(stderr, "mpi_world() is for use inside of tests\n");
    std::abort();
  }
  return *the_world;
}

}  // namespace shardtune

int main(int argc, char** argv) {
  setenv("SHARDTUNE_CHECK_COLLECTIVES", "1", /*overwrite=*/0);
  testing::InitGoogleTest(&argc, argv);
  shardtune::MpiEnvironment environment(&argc, &argv);
  try {
    return shardtune::run_tests(environment);
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", environment.rank(), error.what());
    environment.abort(1);
  }
}
