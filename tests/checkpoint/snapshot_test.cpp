// What a writer thread takes from a snapshot is the state of the moment it was made, whatever training does meanwhile.
#include <atomic>
#include <cstring>
#include <random>
#include <system_error>
#include <thread>

#include <pthread.h>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "checkpoint/background_worker.hpp"
#include "checkpoint/checkpoint_store.hpp"
#include "checkpoint/snapshot.hpp"
#include "core/error.hpp"
#include "distributed/comm/thread_group.hpp"
#include "tests/checkpoint/temp_dir.hpp"
#include "tests/checkpoint/test_state.hpp"

namespace shardtune {
namespace {

constexpr std::size_t kNoLimit = std::size_t{1} << 40;

StateView view_of(const std::vector<at::Tensor>& tensors) {
  StateView view;
  for (std::size_t i = 0; i < tensors.size(); ++i)
    view.slices.push_back({"t" + std::to_string(i), "value", {tensors[i].numel()}, 0, tensors[i]});
  return view;
}

std::vector<at::Tensor> numbered_tensors() {
  std::vector<at::Tensor> tensors;
  for (const std::int64_t numel : {5, 3'000'001, 1, 0, 1'048'576, 40, 2'500'000})
    tensors.push_back(at::arange(numel, at::kFloat) + static_cast<double>(numel));
  return tensors;
}

// Takes everything, `delay` microseconds a piece, and returns the tensors put together.
std::vector<at::Tensor> take_all(Snapshot& snapshot, int delay_us) {
  std::vector<at::Tensor> taken;
  for (const StateSlice& slice : snapshot.view().slices)
    taken.push_back(at::full({slice.data.numel()}, -1.0, at::kFloat));
  std::vector<char> buffer(Snapshot::kPieceBytes);
  std::size_t num_told = 0;
  const auto copied = [&](const Snapshot::Piece& piece, std::size_t begin, std::size_t size) {
    EXPECT_EQ(begin, num_told);
    num_told += size;
    std::memcpy(static_cast<char*>(taken[piece.slice].data_ptr()) + piece.begin + begin, buffer.data() + begin, size);
  };
  while (const auto piece = snapshot.take(buffer.data(), copied)) {
    EXPECT_EQ(std::exchange(num_told, 0), piece->size);
    std::this_thread::sleep_for(std::chrono::microseconds(delay_us));
  }
  return taken;
}

void expect_equal(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b) {
  ASSERT_EQ(a.size(), b.size());
  for (std::size_t i = 0; i < a.size(); ++i) EXPECT_TRUE(at::equal(a[i], b[i])) << i;
}

// The writer is slow, training overwrites the tensors in a random order, in whole or in part, again and again.
TEST(Snapshot, HoldsTheMomentWhileTensorsAreOverwritten) {
  for (int round = 0; round < 12; ++round) {
    const std::vector<at::Tensor> tensors = numbered_tensors();
    std::vector<at::Tensor> before;
    for (const at::Tensor& tensor : tensors) before.push_back(tensor.clone());
    const std::size_t limit = round % 3 == 0 ? kNoLimit : round % 3 == 1 ? 1 : std::size_t{6} << 20;
    Snapshot snapshot(view_of(tensors), limit);
    std::vector<at::Tensor> taken;
    std::thread writer([&] { taken = take_all(snapshot, round < 6 ? 0 : 2000); });
    std::mt19937 random(static_cast<unsigned>(round));
    for (int change = 0; change < 40; ++change) {
      const at::Tensor& tensor = tensors[random() % tensors.size()];
      const std::int64_t begin = tensor.numel() == 0 ? 0 : static_cast<std::int64_t>(random()) % tensor.numel();
      const at::Tensor part = tensor.narrow(0, begin, tensor.numel() - begin);
      snapshot.preserve(part);
      part.fill_(-7.0);
    }
    writer.join();
    expect_equal(taken, before);
    const Snapshot::Cost cost = snapshot.cost();
    EXPECT_LE(cost.most_staged_bytes, std::max(limit, Snapshot::kPieceBytes));
  }
}

TEST(Snapshot, StagesEverythingWithoutAWriterAndCountsIt) {
  const std::vector<at::Tensor> tensors = numbered_tensors();
  std::vector<at::Tensor> before;
  std::uint64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) before.push_back(tensor.clone()), bytes += tensor.nbytes();
  Snapshot snapshot(view_of(tensors), kNoLimit);
  for (const at::Tensor& tensor : tensors) {
    snapshot.preserve(tensor);
    tensor.zero_();
    snapshot.preserve(tensor);  // nothing is copied twice
  }
  EXPECT_EQ(snapshot.cost().copied_bytes, bytes);
  EXPECT_EQ(snapshot.cost().most_staged_bytes, bytes);
  expect_equal(take_all(snapshot, 0), before);
}

TEST(Snapshot, NothingIsCopiedForOtherTensorsOrAfterTheEnd) {
  const std::vector<at::Tensor> tensors = numbered_tensors();
  Snapshot snapshot(view_of(tensors), kNoLimit);
  snapshot.preserve(at::zeros({1000}, at::kFloat));
  EXPECT_EQ(snapshot.cost().copied_bytes, 0u);
  take_all(snapshot, 0);
  for (const at::Tensor& tensor : tensors) snapshot.preserve(tensor);
  EXPECT_EQ(snapshot.cost().copied_bytes, 0u);
}

TEST(Snapshot, AFailedWriterFreesTheTrainingThread) {
  for (const bool is_within_a_piece : {false, true}) {
    const std::vector<at::Tensor> tensors = numbered_tensors();
    Snapshot snapshot(view_of(tensors), 1);
    std::atomic<bool> has_taken = false;
    std::thread writer([&] {
      std::vector<char> buffer(Snapshot::kPieceBytes);
      const auto copied = [&](const Snapshot::Piece&, std::size_t, std::size_t) {
        has_taken = true;
        std::this_thread::sleep_for(std::chrono::milliseconds(20));
        if (is_within_a_piece) throw std::bad_alloc();
      };
      try {
        snapshot.take(buffer.data(), copied);
      } catch (const std::bad_alloc&) {
      }
      snapshot.abandon();
    });
    while (!has_taken) std::this_thread::yield();
    for (const at::Tensor& tensor : tensors) snapshot.preserve(tensor);  // would wait for ever
    writer.join();
  }
}

TEST(Snapshot, ACancelledOneThrowsInTheWriter) {
  const std::vector<at::Tensor> tensors = numbered_tensors();
  Snapshot snapshot(view_of(tensors), kNoLimit);
  snapshot.cancel();
  EXPECT_THROW(take_all(snapshot, 0), Error);
}

// Several ranks save again and again while "training" overwrites the state: every checkpoint holds its own step.
void expect_every_moment(int ranks_per_file) {
  TempDir dir;
  const auto tensors = test_tensors(2000);
  std::atomic<std::uint64_t> copied = 0;
  run_thread_ranks(3, [&](Communicator& comm) {
    CheckpointStore store(dir.path(), comm, std::size_t{1} << 20, ranks_per_file);
    StateView live = expected_state(tensors, 1, comm.rank(), comm.size());
    for (std::int64_t step = 1; step <= 6; ++step) {
      store.begin_save(step, live, {});
      EXPECT_TRUE(store.is_saving());
      StateView next = expected_state(tensors, step + 1, comm.rank(), comm.size());
      for (std::size_t i = 0; i < live.slices.size(); ++i) {
        store.preserve(live.slices[i].data);
        live.slices[i].data.copy_(next.slices[i].data);
      }
      live.run = next.run;
      const SaveReport report = store.finish_save();
      EXPECT_EQ(report.step, step);
      EXPECT_FALSE(store.is_saving());
      copied += report.cost.copied_bytes;
    }
  });
  EXPECT_GT(copied, 0u);
  const auto comm = make_self_communicator();
  for (std::int64_t step = 1; step <= 6; ++step) {
    const auto checkpoint = dir / ("checkpoint-" + std::to_string(step));
    EXPECT_TRUE(verify_checkpoint(checkpoint).empty());
    StateView loaded = blank_state(tensors, 0, 1);
    CheckpointStore(dir.path(), *comm).load(checkpoint, loaded);
    EXPECT_EQ(difference(loaded, tensors, step, 0, 1), "") << step;
  }
}

TEST(BackgroundSave, EveryCheckpointHoldsItsMomentOnThreeRanks) {
  expect_every_moment(1);
  expect_every_moment(2);
}

TEST(BackgroundSave, AFailureIsReportedOnEveryRankWhenTheStageIsAdvancedAndTheNextSaveWorks) {
  TempDir dir;
  const auto tensors = test_tensors();
  std::atomic<int> countdown = 5;
  set_save_phase_hook([&](const char* phase, std::int64_t step) {
    if (step == 2 && std::string_view(phase) == "dataset_written" && countdown-- == 0) fail(ErrorKind::io, "injected");
  });
  run_thread_ranks(3, [&](Communicator& comm) {
    CheckpointStore store(dir.path(), comm);
    for (std::int64_t step = 1; step <= 3; ++step) {
      store.begin_save(step, expected_state(tensors, step, comm.rank(), comm.size()), {.keep = 1});
      try {
        store.finish_save();
        EXPECT_NE(step, 2);
      } catch (const Error& e) {
        EXPECT_EQ(step, 2);
        EXPECT_NE(std::string(e.what()).find("injected"), std::string::npos);
      }
      EXPECT_FALSE(store.is_saving());
      comm.barrier();
      EXPECT_TRUE(std::filesystem::exists(dir / (step == 3 ? "checkpoint-3" : "checkpoint-1")));
      EXPECT_FALSE(std::filesystem::exists(dir / "checkpoint-2.partial"));
      comm.barrier();
    }
  });
  set_save_phase_hook(nullptr);
}

// A run that ends by an exception does not wait for the disk and commits nothing.
TEST(BackgroundSave, AStoreThatIsDestroyedGivesUpItsSave) {
  TempDir dir;
  const auto tensors = test_tensors(2000);
  run_thread_ranks(2, [&](Communicator& comm) {
    CheckpointStore store(dir.path(), comm);
    store.begin_save(1, expected_state(tensors, 1, comm.rank(), comm.size()), {});
  });
  EXPECT_FALSE(std::filesystem::exists(dir / "checkpoint-1"));
}

TEST(BackgroundWorker, WithoutAThreadThereIsNoJobToWaitFor) {
  pthread_attr_t usual, absurd;
  ASSERT_EQ(pthread_getattr_default_np(&usual), 0);
  ASSERT_EQ(pthread_attr_init(&absurd), 0);
  ASSERT_EQ(pthread_attr_setstacksize(&absurd, std::size_t{1} << 47), 0);  // more than there are addresses
  BackgroundWorker worker;
  int runs = 0;
  ASSERT_EQ(pthread_setattr_default_np(&absurd), 0);
  EXPECT_THROW(worker.start([&] { ++runs; }), std::system_error);
  ASSERT_EQ(pthread_setattr_default_np(&usual), 0);
  EXPECT_FALSE(worker.is_running());
  worker.wait();
  worker.start([&] { ++runs; });
  worker.collect();
  EXPECT_EQ(runs, 1);
}

}  // namespace
}  // namespace shardtune
