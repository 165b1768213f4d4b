// What saving costs a training loop: benchmark_checkpoint DIR NUM_RANKS MEBIBYTES STEP_MS SAVES
// Ranks are threads. A step computes for STEP_MS milliseconds (one core per rank) and then changes the whole state in
// place as an optimizer does. Prints one JSON object; benchmarks/checkpoint/compare.py puts it beside torch.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <filesystem>
#include <string>
#include <vector>

#include <ATen/Parallel.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <fmt/format.h>
#include <nlohmann/json.hpp>

#include "checkpoint/checkpoint_store.hpp"
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

void compute(double seconds) {
  volatile double sum = 0;
  for (const auto start = Clock::now(); since(start) < seconds;)
    for (int i = 1; i < 1000; ++i) sum = sum + 1.0 / i;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values.empty() ? 0 : values[values.size() / 2];
}

class Loop {
 public:
  Loop(Communicator& comm, const std::filesystem::path& dir, StateView state, double step_seconds)
      : comm_(comm), store_(dir, comm, std::size_t{2} << 30), state_(std::move(state)), step_seconds_(step_seconds) {}

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
    compute(step_seconds_);
    for (StateSlice& slice : state_.slices) {
      const auto before = Clock::now();
      store_.preserve(slice.data);
      stall += since(before);
      slice.data.mul_(0.999);
    }
    return since(start);
  }

  double begin_save(std::int64_t number) {
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
    const auto start = Clock::now();
    store_.load(checkpoint, state_);
    return since(start);
  }

  std::vector<SaveReport> reports;

 private:
  Communicator& comm_;
  CheckpointStore store_;
  StateView state_;
  double step_seconds_;
};

nlohmann::json measure(Communicator& comm, const std::filesystem::path& dir, std::int64_t bytes, double step_seconds,
                       int num_saves) {
  Loop loop(comm, dir, make_state(bytes, comm.rank(), comm.size()), step_seconds);
  double ignored = 0;
  std::vector<double> quiet, during, stalls, in_between;
  for (int i = 0; i < 8; ++i) quiet.push_back(loop.step(ignored));
  int number = 1;
  for (int save = 0; save < num_saves; ++save) {
    double stall = loop.begin_save(number++);
    while (loop.is_saving()) during.push_back(loop.step(stall));
    stalls.push_back(stall);
    for (int i = 0; i < 4; ++i) quiet.push_back(loop.step(ignored));
  }
  std::vector<double> write_rates, commit_seconds;
  for (const SaveReport& report : loop.reports) {
    write_rates.push_back(static_cast<double>(report.bytes) / report.write_seconds / 1e6);
    commit_seconds.push_back(report.seconds);
  }
  for (int save = 0; save < 2; ++save) in_between.push_back(loop.save_in_between(number++));
  const double load_seconds = loop.load(dir / fmt::format("checkpoint-{}", number - 1));
  return {{"state_megabytes", static_cast<double>(bytes) / 1e6},
          {"num_ranks", comm.size()},
          {"stall_seconds", median(stalls)},
          {"step_seconds", median(quiet)},
          {"step_seconds_during_save", median(during)},
          {"steps_during_saves", during.size()},
          {"copied_megabytes",
           loop.reports.empty() ? 0.0 : static_cast<double>(loop.reports.back().cost.copied_bytes) / 1e6},
          {"commit_seconds", median(commit_seconds)},
          {"write_megabytes_per_second", median(write_rates)},
          {"save_in_between_seconds", median(in_between)},
          {"load_megabytes_per_second", static_cast<double>(bytes) / load_seconds / 1e6}};
}

}  // namespace
}  // namespace shardtune

int main(int argc, char** argv) {
  using namespace shardtune;
  if (argc != 6) {
    std::fprintf(stderr, "usage: %s DIR NUM_RANKS MEBIBYTES STEP_MS SAVES\n", argv[0]);
    return 2;
  }
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
