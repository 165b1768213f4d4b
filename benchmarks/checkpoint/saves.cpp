// What saving costs a training loop: benchmark_checkpoint DIR NUM_RANKS MEBIBYTES STEP_MS SAVES
// Ranks are threads. A step is a fixed amount of matrix products, which take STEP_MS milliseconds when nothing else
// runs (one core per rank), and then changes the whole state in place as an optimizer does. Prints one JSON object;
// benchmarks/checkpoint/compare.py puts it beside torch.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <fcntl.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
#include "core/allocator.hpp"
#include "core/file.hpp"
#include "distributed/comm/thread_group.hpp"

namespace shardtune {
namespace {

using Clock = std::chrono::steady_clock;
double since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Layers like those of a 124M model: three fields of large and small tensors until `bytes` are reached.
StateView make_state(std::int64_t bytes, int rank, int num_ranks) {
  StateView view;
  const std::vector<std::int64_t> sizes = {768 * 768, 768, 768 * 3072, 3072, 768 * 3072, 768};
  for (std::int64_t i = 0, held = 0; held < bytes; ++i) {
    const std::int64_t numel = sizes[static_cast<std::size_t>(i) % sizes.size()];
    const std::int64_t begin = numel * rank / num_ranks, end = numel * (rank + 1) / num_ranks;
    for (const char* field : {"value", "exp_avg", "exp_avg_sq"})
      view.slices.push_back({fmt::format("layer.{}", i),
                             field,
                             {numel},
                             begin,
                             at::full({end - begin}, 1.0 + static_cast<double>(i), at::kFloat)});
    held += numel * 12;
  }
  view.run = {{"step", 0}, {"run_id", "benchmark"}};
  return view;
}

// Work that a writer thread on the same core can slow down.
class Work {
 public:
  // How many products take `seconds` while the other ranks do the same.
  Work(Communicator& comm, double seconds) {
    at::Tensor warm = at::zeros({1}, at::kLong);
    multiply(20);
    comm.all_reduce(warm, ReduceOp::max).wait();
    const auto start = Clock::now();
    multiply(200);
    count_ = std::max(1, static_cast<int>(200 * seconds / since(start)));
  }
  void run() { multiply(count_); }

 private:
  void multiply(int times) {
    for (int i = 0; i < times; ++i) at::mm_out(out_, a_, b_);
  }
  at::Tensor a_ = at::full({256, 768}, 0.5, at::kFloat), b_ = at::full({768, 768}, 0.5, at::kFloat),
             out_ = at::zeros({256, 768}, at::kFloat);
  int count_ = 1;
};

// The next reader must go to the disk.
void drop_from_cache(const std::filesystem::path& directory) {
  for (const auto& file : std::filesystem::directory_iterator(directory))
    ::posix_fadvise(open_for_reading(file.path()).get(), 0, 0, POSIX_FADV_DONTNEED);
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

class Loop {
 public:
  Loop(Communicator& comm, const std::filesystem::path& dir, StateView state, double step_seconds)
      : comm_(comm), store_(dir, comm, std::size_t{2} << 30), state_(std::move(state)), work_(comm, step_seconds) {}

  // One step; the time that saving takes of it is added to `stall`.
  double step(double& stall) {
    const auto start = Clock::now();
    at::Tensor word = at::full({1}, store_.is_working() ? 1 : 0, at::kLong);
    comm_.all_reduce(word, ReduceOp::max).wait();
    if (store_.is_saving() && word.item<std::int64_t>() == 0) {
      const auto before = Clock::now();
      if (const auto report = store_.advance_save()) reports.push_back(*report);
      stall += since(before);
    }
    work_.run();
    for (StateSlice& slice : state_.slices) {
      const auto before = Clock::now();
      store_.preserve(slice.data);
      stall += since(before);
      slice.data.mul_(0.999);
    }
    return since(start);
  }

  double begin_save(std::int64_t number) {
    meet();  // a slower rank is waited for anyway, here or in the next step
    const auto start = Clock::now();
    store_.begin_save(number, state_, {.keep = 1});
    return since(start);
  }
  bool is_saving() const { return store_.is_saving(); }
  double save_in_between(std::int64_t number) {
    const auto start = Clock::now();
    store_.save(number, state_, {.keep = 1});
    return since(start);
  }
  double load(const std::filesystem::path& checkpoint) {
    if (comm_.rank() == 0) drop_from_cache(checkpoint);
    meet();
    const auto start = Clock::now();
    store_.load(checkpoint, state_);
    return since(start);
  }

  std::vector<SaveReport> reports;

 private:
  void meet() {
    at::Tensor word = at::zeros({1}, at::kLong);
    comm_.all_reduce(word, ReduceOp::max).wait();
  }

  Communicator& comm_;
  CheckpointStore store_;
  StateView state_;
  Work work_;
};

nlohmann::json measure(Communicator& comm, const std::filesystem::path& dir, std::int64_t bytes, double step_seconds,
                       int num_saves) {
  Loop loop(comm, dir, make_state(bytes, comm.rank(), comm.size()), step_seconds);
  double ignored = 0;
  std::vector<double> quiet, during, stalls, in_between;
  for (int i = 0; i < 5; ++i) quiet.push_back(loop.step(ignored));
  int number = 1;
  for (int save = 0; save < num_saves; ++save) {
    double stall = loop.begin_save(number++);
    while (loop.is_saving()) during.push_back(loop.step(stall));
    stalls.push_back(stall);
    for (int i = 0; i < 2; ++i) quiet.push_back(loop.step(ignored));
  }
  std::vector<double> write_rates, commit_seconds;
  for (const SaveReport& report : loop.reports) {
    write_rates.push_back(static_cast<double>(report.bytes) / report.write_seconds / 1e6);
    commit_seconds.push_back(report.seconds);
  }
  for (int save = 0; save < 2; ++save) in_between.push_back(loop.save_in_between(number++));
  std::vector<double> loads;
  for (int i = 0; i < 3; ++i) loads.push_back(loop.load(dir / fmt::format("checkpoint-{}", number - 1)));
  // What the saves have cost altogether, wherever it fell.
  double extra = 0;
  for (const double seconds : during) extra += seconds - median(quiet);
  return {{"state_megabytes", static_cast<double>(bytes) / 1e6},
          {"num_ranks", comm.size()},
          {"stall_seconds", median(stalls)},
          {"step_seconds", median(quiet)},
          {"step_seconds_during_save", median(during)},
          {"steps_during_saves", during.size()},
          {"lost_seconds_per_save", extra / num_saves},
          {"copied_megabytes",
           loop.reports.empty() ? 0.0 : static_cast<double>(loop.reports.back().cost.copied_bytes) / 1e6},
          {"copy_seconds", loop.reports.empty() ? 0.0 : loop.reports.back().cost.copy_seconds},
          {"wait_seconds", loop.reports.empty() ? 0.0 : loop.reports.back().cost.wait_seconds},
          {"commit_seconds", median(commit_seconds)},
          {"write_megabytes_per_second", median(write_rates)},
          {"save_in_between_seconds", median(in_between)},
          {"load_megabytes_per_second", static_cast<double>(bytes) / median(loads) / 1e6}};
}

}  // namespace
}  // namespace shardtune

int main(int argc, char** argv) {
  using namespace shardtune;
  if (argc != 6) {
    std::fprintf(stderr, "usage: %s DIR NUM_RANKS MEBIBYTES STEP_MS SAVES\n", argv[0]);
    return 2;
  }
  tune_allocator();
  const std::filesystem::path dir = argv[1];
  std::filesystem::create_directories(dir);
  run_thread_ranks(std::stoi(argv[2]), [&](Communicator& comm) {
    at::set_num_threads(1);
    const nlohmann::json result =
        measure(comm, dir, std::stoll(argv[3]) << 20, std::stod(argv[4]) / 1e3, std::stoi(argv[5]));
    if (comm.rank() == 0) std::printf("%s\n", result.dump().c_str());
  });
  return 0;
}
