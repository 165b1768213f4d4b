// Collectives through shared memory and over pretended nodes, with ranks as threads.
#include <csignal>
#include <cstring>
#include <filesystem>
#include <optional>
#include <string>
#include <vector>

#include <fcntl.h>
#include <gtest/gtest.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <ATen/ATen.h>

#include "core/error.hpp"
#include "distributed/comm/copy_bytes.hpp"
#include "distributed/comm/shared_segment.hpp"
#include "distributed/comm/thread_group.hpp"
#include "distributed/comm/transport_seams.hpp"
#include "tests/comm/buffered_communicator.hpp"
#include "tests/comm/conformance.hpp"
#include "tests/support/error_of.hpp"

namespace shardtune {
namespace {

// Far beyond what any test needs, short enough for a broken one.
constexpr auto kTimeout = std::chrono::seconds(60);

LayerOptions options_for(int rank, int node_size, std::int64_t slot_bytes = 0) {
  LayerOptions options;
  options.use = SharedMemoryUse::always;
  options.node = rank / node_size;
  options.slot_bytes = slot_bytes;
  options.timeout = kTimeout;
  return options;
}

template <class Body>
void run_layered(int num_ranks, int node_size, std::int64_t slot_bytes, Body body) {
  run_thread_ranks(num_ranks, [&](Communicator& threads) {
    const auto group = split_layered(threads, options_for(threads.rank(), node_size, slot_bytes));
    body(*group);
  });
}

class SharedMemoryRanks : public testing::TestWithParam<int> {};
INSTANTIATE_TEST_SUITE_P(Sizes, SharedMemoryRanks, testing::Values(2, 3, 4, 5));

TEST_P(SharedMemoryRanks, PassTheConformanceSuite) {
  run_layered(GetParam(), GetParam(), 0, [](Communicator& group) {
    ASSERT_EQ(describe_transport(group), "shared memory");
    conformance::run_all(group);
  });
}

TEST_P(SharedMemoryRanks, PassTheConformanceSuiteWithOneCacheLinePerRankAndRound) {
  run_layered(GetParam(), GetParam(), 1, conformance::run_all);
}

TEST_P(SharedMemoryRanks, PassTheConformanceSuiteOnTensorsInBuffers) {
  run_layered(GetParam(), GetParam(), 4096, [](Communicator& group) {
    conformance::run_all(*conformance::make_buffered_communicator(group, /*uses_buffers=*/true));
  });
}

TEST_P(SharedMemoryRanks, PassTheConformanceSuiteWhenOnlySomeTensorsLieInBuffers) {
  run_layered(GetParam(), GetParam(), 4096, [](Communicator& group) {
    conformance::run_all(*conformance::make_buffered_communicator(group, group.rank() % 2 == 0));
  });
}

TEST(SharedMemoryRanks, PassTheConformanceSuiteWhereThereAreEight) { run_layered(8, 8, 0, conformance::run_all); }

TEST(SharedMemoryRanks, AgreeOnBuffersWhereOneRankHasNothingToGive) {
  run_layered(3, 3, 4096, [](Communicator& group) {
    const std::int64_t numel = 3000;
    const at::Tensor buffer = group.make_buffer(3 * numel, at::kLong);
    const bool has_none = group.rank() == 1;
    const at::Tensor in = has_none ? at::empty({0}, at::kLong) : buffer.fill_(group.rank());
    const at::Tensor out = at::empty({2 * numel}, at::kLong);
    const std::vector<std::int64_t> out_counts = {numel, 0, numel};
    const std::vector<std::int64_t> in_counts(3, has_none ? 0 : numel);
    group.all_to_all(out, out_counts, in, in_counts).wait();
    EXPECT_TRUE(at::equal(out, at::cat({at::zeros({numel}, at::kLong), at::full({numel}, 2, at::kLong)})));
  });
}

TEST(SharedMemoryRanks, HaveMemoryInCommonThatOutlivesTheGroup) {
  run_layered(3, 3, 4096, [](Communicator& group) {
    at::Tensor shared;
    std::unique_ptr<ProgressBoard> board;
    {
      const auto part = group.split(0, 0);
      shared = part->make_shared(7, at::kFloat);
      ASSERT_TRUE(shared.defined());
      board = part->make_progress_board();
      ASSERT_NE(board, nullptr);
    }
    if (group.rank() == 1) shared.fill_(3.0);
    board->publish(1);
    board->wait_for_all(1);
    EXPECT_EQ(shared[6].item<float>(), 3.0F);
  });
}

TEST(SharedMemoryRanks, ReadFromDifferentBuffersAndAfterBuffersAreGone) {
  run_layered(2, 2, 4096, [](Communicator& group) {
    for (int i = 0; i < 4; ++i) {
      std::vector<at::Tensor> buffers = {group.make_buffer(5000, at::kFloat), group.make_buffer(5000, at::kFloat)};
      const at::Tensor tensor = buffers[static_cast<std::size_t>(group.rank())].fill_(group.rank() + 1);
      if (group.rank() == 0) buffers.pop_back();  // the peer's tensor lies in a buffer this rank uses no longer
      group.all_reduce(tensor, ReduceOp::sum).wait();
      EXPECT_TRUE(at::equal(tensor, at::full({5000}, 3.0, at::kFloat)));
    }
  });
}

TEST(CopyBytes, CopiesAllAndOnlyWhatItShouldAtAnyAlignment) {
  const at::Tensor from = at::randint(256, {kStreamBytes + 1000}, at::kByte);
  const auto* in = static_cast<const std::byte*>(from.const_data_ptr());
  for (const std::int64_t bytes :
       {std::int64_t{0}, std::int64_t{77}, kStreamBytes - 1, kStreamBytes, kStreamBytes + 131}) {
    for (const int shift : {0, 1, 63}) {
      const at::Tensor to = at::full({kStreamBytes + 1000}, 7, at::kByte);
      const at::Tensor expected = to.clone();
      expected.narrow(0, shift, bytes).copy_(from.narrow(0, 5, bytes));
      copy_bytes(static_cast<std::byte*>(to.mutable_data_ptr()) + shift, in + 5, bytes);
      EXPECT_TRUE(at::equal(to, expected)) << bytes << " bytes at " << shift;
    }
  }
}

TEST(SharedMemoryRanks, GatherAndExchangeWhatIsLargerThanTheCaches) {
  const std::int64_t numel = kStreamBytes / 8 + 17;  // int64 of a rank, and for a rank
  run_layered(2, 2, 0, [&](Communicator& group) {
    const at::Tensor buffer = group.make_buffer(2 * numel, at::kLong);
    const at::Tensor out = at::empty({2 * numel}, at::kLong);
    const std::vector<std::int64_t> counts(2, numel);
    const auto iota = [&](std::int64_t first, std::int64_t count) {
      return at::arange(first, first + count, at::kLong);
    };
    buffer.copy_(iota(group.rank() * 2 * numel, 2 * numel));
    group.all_gather(out, buffer.narrow(0, 0, numel), counts).wait();
    EXPECT_TRUE(at::equal(out, at::cat({iota(0, numel), iota(2 * numel, numel)})));
    group.all_to_all(out, counts, buffer, counts).wait();
    EXPECT_TRUE(at::equal(out, at::cat({iota(group.rank() * numel, numel), iota((2 + group.rank()) * numel, numel)})));
  });
}

struct Shape {
  int num_ranks;
  int node_size;
  const char* transport;
};
class Nodes : public testing::TestWithParam<Shape> {};
INSTANTIATE_TEST_SUITE_P(Shapes, Nodes,
                         testing::Values(Shape{4, 2, "2 nodes of 2 ranks: shared memory within, threads across"},
                                         Shape{6, 2, "3 nodes of 2 ranks: shared memory within, threads across"},
                                         Shape{8, 4, "2 nodes of 4 ranks: shared memory within, threads across"},
                                         Shape{6, 3, "threads"},  // sums over three ranks are no part of the tree
                                         Shape{5, 2, "threads"},  // the last node has one rank
                                         Shape{4, 1, "threads"}));

TEST_P(Nodes, PassTheConformanceSuite) {
  const Shape& shape = GetParam();
  run_layered(shape.num_ranks, shape.node_size, 0, [&](Communicator& group) {
    ASSERT_EQ(describe_transport(group), shape.transport);
    conformance::run_all(group);
    if (shape.num_ranks > 6) return;  // the rest is the same with fewer
    conformance::run_all(*conformance::make_buffered_communicator(group, true));
    const auto node = group.split(group.rank() / shape.node_size, 0);  // chooses anew
    if (node->size() > 1) {
      EXPECT_EQ(describe_transport(*node), "shared memory");
    }
    conformance::run_all(*node);
  });
}

TEST(RanksPerNode, AreEvenPowersOfTwoOfConsecutiveRanks) {
  const auto of = [](const std::vector<std::int64_t>& nodes) { return ranks_per_node(nodes); };
  EXPECT_EQ(of({7, 7, 3, 3}), 2);
  EXPECT_EQ(of({0, 0, 0, 0, 4, 4, 4, 4, 8, 8, 8, 8}), 4);
  EXPECT_EQ(of({0, 0, 0}), std::nullopt);
  EXPECT_EQ(of({0, 1}), std::nullopt);
  EXPECT_EQ(of({0, 1, 0, 1}), std::nullopt);
  EXPECT_EQ(of({0, 0, 1, 1, 0, 0}), std::nullopt);
  EXPECT_EQ(of({0, 0, 0, 1, 1, 1}), std::nullopt);
  EXPECT_EQ(of({0, 0, 1}), std::nullopt);
}

TEST(SharedMemory, OfARankThatDoesNotComeEndsWithAnErrorThatNamesIt) {
  run_thread_ranks(3, [](Communicator& threads) {
    LayerOptions options = options_for(0, 3);
    options.timeout = std::chrono::seconds(1);
    const auto group = split_layered(threads, options);
    const auto board = group->make_progress_board();
    if (group->rank() == 1) return;
    board->publish(1);
    const auto expect_late = [](const char* what, const auto& wait) {
      const std::string text = testing_support::error_of(ErrorKind::comm, wait);
      EXPECT_EQ(text.find(what), 0U) << text;
      EXPECT_NE(text.find("has waited 1 s for rank 1"), std::string::npos) << text;
    };
    expect_late("memory in common", [&] { board->wait_for_all(1); });
    expect_late("", [&] { group->barrier(); });
  });
}

std::vector<std::string> segment_names() {
  std::vector<std::string> names;
  for (const auto& entry : std::filesystem::directory_iterator("/dev/shm")) {
    const std::string name = entry.path().filename().string();
    if (name.starts_with("shardtune." + std::to_string(::getpid()) + ".")) names.push_back(name);
  }
  return names;
}

TEST(SharedMemory, HasNoNameOnceItIsThere) {
  run_layered(4, 4, 0, [](Communicator& group) {
    const at::Tensor buffer = group.make_buffer(100, at::kFloat);
    group.barrier();
    EXPECT_EQ(segment_names(), std::vector<std::string>{});
    group.barrier();
  });
}

TEST(SharedMemory, SweepsTheNamesOfTheDeadAndLeavesThoseOfTheLiving) {
  const std::string base = "shardtune." + std::to_string(::getpid()) + ".";
  const auto create = [&](const std::string& name) { return ::shm_open(("/" + name).c_str(), O_RDWR | O_CREAT, 0600); };
  const int living = create(base + "living");
  ASSERT_GE(living, 0);
  ASSERT_EQ(::flock(living, LOCK_EX), 0);
  const pid_t child = ::fork();
  if (child == 0) {  // makes a name as a rank does, and dies before anyone removes it
    const int file = create(base + "dead");
    ::_exit(file >= 0 && ::flock(file, LOCK_EX) == 0 ? 0 : 1);
  }
  int status = -1;
  ASSERT_EQ(::waitpid(child, &status, 0), child);
  ASSERT_EQ(status, 0);
  ASSERT_EQ(segment_names().size(), 2U);
  sweep_stale_segments();
  EXPECT_EQ(segment_names(), std::vector<std::string>{base + "living"});
  ::close(living);
  sweep_stale_segments();
  EXPECT_EQ(segment_names(), std::vector<std::string>{});
}

// The kernel refuses to reserve memory, as it does where /dev/shm is full. Of the whole process.
class NoSharedMemory {
 public:
  NoSharedMemory() {
    previous_ = std::signal(SIGXFSZ, SIG_IGN);
    ::getrlimit(RLIMIT_FSIZE, &limit_);
    rlimit none = limit_;
    none.rlim_cur = 0;
    ::setrlimit(RLIMIT_FSIZE, &none);
  }
  ~NoSharedMemory() {
    ::setrlimit(RLIMIT_FSIZE, &limit_);
    std::signal(SIGXFSZ, previous_);
  }
  NoSharedMemory(const NoSharedMemory&) = delete;
  NoSharedMemory& operator=(const NoSharedMemory&) = delete;

 private:
  rlimit limit_{};
  void (*previous_)(int) = nullptr;
};

class Refused : public testing::TestWithParam<int> {};  // ranks per node
INSTANTIATE_TEST_SUITE_P(Shapes, Refused, testing::Values(2, 4));

TEST_P(Refused, SharedMemoryFallsBackToMessages) {
  run_thread_ranks(4, [](Communicator& threads) {
    LayerOptions options = options_for(threads.rank(), GetParam());
    options.use = SharedMemoryUse::if_possible;
    std::optional<NoSharedMemory> none;
    if (threads.rank() == 0) none.emplace();
    threads.barrier();
    const auto group = split_layered(threads, options);
    threads.barrier();
    none.reset();
    EXPECT_EQ(describe_transport(*group), "threads");
    conformance::run_all(*group);
  });
}

TEST_P(Refused, SharedMemoryThatMustBeUsedIsANamedError) {
  run_thread_ranks(4, [](Communicator& threads) {
    std::optional<NoSharedMemory> none;
    if (threads.rank() == 0) none.emplace();
    threads.barrier();
    try {
      (void)split_layered(threads, options_for(threads.rank(), GetParam()));
      ADD_FAILURE() << "no error";
    } catch (const Error& error) {
      EXPECT_EQ(error.kind(), ErrorKind::comm);
      const std::string text = error.what();
      EXPECT_NE(text.find("shared memory"), std::string::npos) << text;
      EXPECT_NE(text.find("SHARDTUNE_COMM=mpi"), std::string::npos) << text;
    }
    threads.barrier();
  });
}

TEST(SharedMemory, ThatIsRefusedToABufferLeavesAnOrdinaryTensor) {
  run_thread_ranks(2, [](Communicator& threads) {
    LayerOptions options = options_for(0, 2);
    options.use = SharedMemoryUse::if_possible;
    const auto group = split_layered(threads, options);
    std::optional<NoSharedMemory> none;
    if (threads.rank() == 0) none.emplace();
    threads.barrier();
    const at::Tensor buffer = group->make_buffer(1000, at::kBFloat16);
    threads.barrier();
    none.reset();
    buffer.fill_(1);
    group->all_reduce(buffer, ReduceOp::sum).wait();
    EXPECT_TRUE(at::equal(buffer, at::full({1000}, 2.0, at::kBFloat16)));
  });
}

}  // namespace
}  // namespace shardtune
