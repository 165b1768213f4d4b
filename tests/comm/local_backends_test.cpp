// Self and Thread backends.
#include <atomic>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "distributed/comm/process_mesh.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/comm/conformance.hpp"

namespace shardtune {
namespace {

TEST(SelfCommunicator, PassesTheConformanceSuite) { conformance::run_all(*make_self_communicator()); }

class ThreadRanks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, ThreadRanks, testing::Values(1, 2, 3, 4, 5, 8));

TEST_P(ThreadRanks, PassTheConformanceSuite) {
  std::atomic<int> num_finished = 0;
  run_thread_ranks(GetParam(), [&](Communicator& communicator) {
    ASSERT_EQ(communicator.size(), GetParam());
    conformance::run_all(communicator);
    ++num_finished;
  });
  EXPECT_EQ(num_finished, GetParam());
}

TEST_P(ThreadRanks, RethrowTheOwnExceptionOfTheRankThatFailsAndEndTheOthers) {
  for (int failing = 0; failing < GetParam(); ++failing) {
    std::atomic<int> num_ended = 0;
    try {
      run_thread_ranks(GetParam(), [&](Communicator& communicator) {
        communicator.barrier();
        if (communicator.rank() == failing) throw std::out_of_range("row 17");
        try {
          communicator.barrier();
        } catch (const Error& error) {
          EXPECT_EQ(error.kind(), ErrorKind::comm);
          EXPECT_NE(std::string(error.what()).find("row 17"), std::string::npos) << error.what();
          ++num_ended;
          throw;
        }
      });
      ADD_FAILURE() << "nothing was thrown";
    } catch (const std::out_of_range& error) {
      EXPECT_STREQ(error.what(), "row 17");
    }
    EXPECT_EQ(num_ended, GetParam() - 1);
  }
}

TEST(ThreadRanksOfParts, AreEndedByAFailureInAnotherPart) {
  EXPECT_THROW(run_thread_ranks(4,
                                [](Communicator& communicator) {
                                  const auto part = communicator.split(communicator.rank() / 2, 0);
                                  if (communicator.rank() == 3) throw std::out_of_range("part");
                                  for (;;) part->all_reduce(at::ones({5000}), ReduceOp::sum).wait();
                                }),
               std::out_of_range);
}

template <class Body>
std::string error_of(int num_ranks, Body body) {
  try {
    run_thread_ranks(num_ranks, body);
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::comm);
    return error.what();
  }
  return "no error";
}

TEST(ThreadRanks, ARankThatEndsEarlyIsNamedInsteadOfWaitedForForever) {
  const std::string message = error_of(3, [](Communicator& communicator) {
    if (communicator.rank() != 1) communicator.barrier();
  });
  EXPECT_NE(message.find("thread rank 1 has ended"), std::string::npos) << message;
}

TEST(ThreadRanks, WaitingAtAProgressBoardAreEndedByARankThatFailsOrEnds) {
  const auto body = [](bool is_failing) {
    return [is_failing](Communicator& communicator) {
      const auto board = communicator.make_progress_board();
      board->publish(communicator.rank() == 2 ? 1 : 2);
      board->wait_for_all(1);
      if (communicator.rank() == 0) return;  // has said all that the others want of it
      if (communicator.rank() == 1) board->wait_for_all(2);
      if (is_failing) fail(ErrorKind::comm, "row 17");
    };
  };
  EXPECT_EQ(error_of(3, body(true)), "row 17");
  const std::string message = error_of(3, body(false));
  EXPECT_NE(message.find("thread rank 2 has ended"), std::string::npos) << message;
}

TEST(ThreadRanks, DifferentCollectivesAreNamedWithTheirRanks) {
  const std::string message = error_of(3, [](Communicator& communicator) {
    const at::Tensor tensor = at::zeros({communicator.rank() == 2 ? 8 : 7}, at::kFloat);
    if (communicator.rank() == 1) communicator.broadcast(tensor, 0).wait();
    else communicator.all_reduce(tensor, ReduceOp::sum).wait();
  });
  EXPECT_NE(message.find("rank 0 #0 all_reduce Float [7], rank 1 #0 broadcast Float [7], rank 2 #0 all_reduce Float [8]"),
            std::string::npos) << message;
}

TEST(ThreadRanks, ADisagreementAboutAPartOfAllToAllIsAnError) {
  const std::string message = error_of(2, [](Communicator& communicator) {
    const std::vector<std::int64_t> out_counts = {1, 2};
    const std::vector<std::int64_t> in_counts = {communicator.rank() == 0 ? 1 : 3, communicator.rank() == 0 ? 1 : 2};
    const at::Tensor in = at::zeros({in_counts[0] + in_counts[1]}, at::kFloat);
    communicator.all_to_all(at::zeros({3}, at::kFloat), out_counts, in, in_counts).wait();
  });
  EXPECT_NE(message.find("rank 1 sends 12 bytes to rank 0, which expects 8"), std::string::npos) << message;
}

TEST(ProcessMesh, NumbersRanksWithTheLastAxisFastest) {
  run_thread_ranks(6, [](Communicator& world) {
    const ProcessMesh mesh(world, {{"dp_replicate", 2}, {"dp_shard", 3}, {"tp", 1}});
    EXPECT_EQ(&mesh.world(), &world);
    EXPECT_EQ(mesh.axis_size("dp_replicate"), 2);
    EXPECT_EQ(mesh.axis_size("dp_shard"), 3);
    EXPECT_EQ(mesh.axis_size("tp"), 1);
    EXPECT_EQ(mesh.axis("dp_replicate").rank(), world.rank() / 3);
    EXPECT_EQ(mesh.axis("dp_shard").rank(), world.rank() % 3);
    const at::Tensor ranks = at::full({1}, world.rank(), at::kLong);
    mesh.axis("dp_shard").all_reduce(ranks, ReduceOp::sum).wait();
    EXPECT_EQ(ranks.item<std::int64_t>(), world.rank() < 3 ? 0 + 1 + 2 : 3 + 4 + 5);
    const at::Tensor columns = at::full({1}, world.rank(), at::kLong);
    mesh.axis("dp_replicate").all_reduce(columns, ReduceOp::sum).wait();
    EXPECT_EQ(columns.item<std::int64_t>(), 2 * (world.rank() % 3) + 3);
    EXPECT_THROW(mesh.axis("pp"), Error);
  });
}

TEST(ProcessMesh, RefusesSizesThatDoNotFitTheJobByName) {
  const auto self = make_self_communicator();
  try {
    ProcessMesh(*self, {{"dp_replicate", 2}, {"dp_shard", 3}});
    FAIL();
  } catch (const Error& error) {
    EXPECT_EQ(error.kind(), ErrorKind::config);
    EXPECT_NE(std::string(error.what()).find("dp_replicate 2 x dp_shard 3 needs 6 ranks but the job has 1"),
              std::string::npos) << error.what();
  }
  EXPECT_THROW(ProcessMesh(*self, {{"dp_shard", 0}}), Error);
  EXPECT_THROW(ProcessMesh(*self, {{"dp_shard", 1}, {"dp_shard", 1}}), Error);
}

}  // namespace
}  // namespace shardtune
