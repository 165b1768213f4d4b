// The MPI backend, under mpirun at several numbers of ranks.
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <memory>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "distributed/comm/process_mesh.hpp"
#include "distributed/comm/thread_group.hpp"
#include "distributed/comm/transport_seams.hpp"
#include "tests/comm/buffered_communicator.hpp"
#include "tests/comm/conformance.hpp"
#include "tests/support/mpi_test.hpp"

namespace shardtune {
namespace {

TEST(MpiCommunicator, PassesTheConformanceSuite) { conformance::run_all(mpi_world()); }

// The registration of this run says what must be in use: no quiet fallback.
TEST(MpiCommunicator, MovesBytesAsTheRunIsMeantTo) {
  const char* expected = std::getenv("SHARDTUNE_EXPECTED_TRANSPORT");
  ASSERT_NE(expected, nullptr);
  EXPECT_EQ(describe_transport(mpi_world()), mpi_world().size() > 1 ? expected : "self");
}

TEST(MpiEnvironment, MakesWaitsInMpiYieldUnlessToldOtherwise) {
  const char* expected = std::getenv("SHARDTUNE_EXPECTED_YIELD");
  EXPECT_STREQ(std::getenv("OMPI_MCA_mpi_yield_when_idle"), expected != nullptr ? expected : "1");
}

TEST(MpiCommunicator, WaitsAtAProgressBoardBesideWhatIsUnderWay) {
  Communicator& world = mpi_world();
  const auto board = world.make_progress_board();
  if (!board) return;  // no memory in common
  const at::Tensor tensor = at::ones({70001}, at::kFloat);
  Work under_way;
  // Rank 0 comes to the sum only after all have waited for it at the board.
  if (world.rank() > 0) under_way = world.all_reduce(tensor, ReduceOp::sum);
  board->publish(1);
  board->wait_for_all(1);
  if (world.rank() == 0) under_way = world.all_reduce(tensor, ReduceOp::sum);
  under_way.wait();
  EXPECT_EQ(tensor[70000].item<float>(), static_cast<float>(world.size()));
}

TEST(MpiCommunicator, PassesTheConformanceSuiteOnTensorsInBuffers) {
  const auto buffered = conformance::make_buffered_communicator(mpi_world(), /*uses_buffers=*/true);
  conformance::run_all(*buffered);
}

TEST(MpiCommunicator, PassesTheConformanceSuiteInASplitGroup) {
  const auto reversed = mpi_world().split(3, -mpi_world().rank());
  ASSERT_EQ(reversed->rank(), mpi_world().size() - 1 - mpi_world().rank());
  conformance::run_all(*reversed);
}

TEST(MpiCommunicator, PassesTheConformanceSuiteWhenEveryMessageIsCutIntoChunks) {
  // 61 divides no element size; many windows of chunks per message.
  const auto chunked = split_with_chunk_limit(mpi_world(), 61);
  conformance::run_all(*chunked);
}

TEST(MpiCommunicator, SumsHaveTheBitsOfThreadRanks) {
  Communicator& world = mpi_world();
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kLong}) {
    for (const std::int64_t numel : {13, 70001}) {
      std::vector<at::Tensor> of_threads(static_cast<std::size_t>(world.size()));
      run_thread_ranks(world.size(), [&](Communicator& threads) {
        const at::Tensor tensor = conformance::make_input(threads.rank(), numel, dtype);
        threads.all_reduce(tensor, ReduceOp::sum).wait();
        of_threads[static_cast<std::size_t>(threads.rank())] = tensor;
      });
      const at::Tensor tensor = conformance::make_input(world.rank(), numel, dtype);
      world.all_reduce(tensor, ReduceOp::sum).wait();
      for (const auto& other : of_threads) {
        EXPECT_EQ(std::memcmp(tensor.const_data_ptr(), other.const_data_ptr(), tensor.nbytes()), 0);
      }
    }
  }
}

TEST(MpiCommunicator, IsTheOnlyOwnerOfNothingOnceWaitedFor) {
  for (int i = 0; i < 100; ++i) {
    const at::Tensor tensor = at::ones({257}, at::kFloat);
    mpi_world().all_reduce(tensor, ReduceOp::sum).wait();
    ASSERT_EQ(tensor.use_count(), 1U);
  }
}

TEST(MpiCommunicator, ALoneRankOfAnAxisIsItsOwnGroup) {
  Communicator& world = mpi_world();
  const ProcessMesh mesh(world, {{"dp_replicate", 1}, {"dp_shard", world.size()}});
  EXPECT_EQ(mesh.axis("dp_replicate").size(), 1);
  const at::Tensor one = at::ones({1}, at::kLong);
  mesh.axis("dp_replicate").all_reduce(one, ReduceOp::sum).wait();
  mesh.axis("dp_shard").all_reduce(one, ReduceOp::sum).wait();
  EXPECT_EQ(one.item<std::int64_t>(), world.size());
}

TEST(MpiCommunicator, SleepsWhileThereIsNothingToDo) {
  mpi_world().barrier();
  const std::clock_t cpu_before = std::clock();  // of all threads of this process
  const auto start = std::chrono::steady_clock::now();
  volatile double sink = 0;
  // This thread computes alone; a communication thread that polled would about double the processor time.
  while (std::chrono::steady_clock::now() - start < std::chrono::milliseconds(300)) sink = sink + 1;
  const std::chrono::duration<double> wall = std::chrono::steady_clock::now() - start;
  EXPECT_LT(static_cast<double>(std::clock() - cpu_before) / CLOCKS_PER_SEC, 1.5 * wall.count());
}

}  // namespace
}  // namespace shardtune
