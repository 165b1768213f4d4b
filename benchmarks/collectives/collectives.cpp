// The collectives beside those of Open MPI and gloo: see README.md.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <stdexcept>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <mpi.h>
#include <unistd.h>

#include "benchmarks/collectives/contestant.hpp"
#include "core/error.hpp"
#include "distributed/comm/exchange.hpp"
#include "distributed/comm/mpi.hpp"
#include "distributed/comm/transport_seams.hpp"

namespace shardtune::benchmark {
namespace {

constexpr const char* kNames[] = {"all_reduce", "reduce_scatter", "all_gather", "all_to_all"};
constexpr std::size_t kNumPeers = 2;  // the first contestants
constexpr int kRounds = 5;            // every contestant has its turn in each

struct Arguments {
  std::int64_t max_bytes = 256 << 20;
  std::vector<Operation> operations;
};

Arguments parse(int argc, char** argv) {
  Arguments arguments;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto name = std::find(std::begin(kNames), std::end(kNames), word);
    if (name != std::end(kNames)) {
      arguments.operations.push_back(static_cast<Operation>(name - std::begin(kNames)));
    } else if (word.starts_with("--max_mib=")) {
      arguments.max_bytes = std::stoll(word.substr(10)) << 20;
    } else {
      fail(ErrorKind::config, fmt::format("'{}' is not an operation and not --max_mib=N", word));
    }
  }
  if (arguments.operations.empty())
    arguments.operations = {Operation::all_reduce, Operation::reduce_scatter, Operation::all_gather,
                            Operation::all_to_all};
  return arguments;
}

int iterations_per_round(std::int64_t bytes) {
  if (bytes <= (1 << 20)) return 40;
  return bytes <= (32 << 20) ? 8 : 2;
}

void barrier() {
  if (MPI_Barrier(MPI_COMM_WORLD) != MPI_SUCCESS) throw std::runtime_error("MPI_Barrier has failed");
}

// Every rank gives rank + 1 in every element: a wrong result shows at both ends of the output.
void check_result(const Contestant& contestant, const Case& c, int num_ranks) {
  const double sum = num_ranks * (num_ranks + 1) / 2.0;
  const bool is_reduced = c.operation == Operation::all_reduce || c.operation == Operation::reduce_scatter;
  const auto first = contestant.out()[0].item<double>();
  const auto last = contestant.out()[contestant.out().numel() - 1].item<double>();
  if (first != (is_reduced ? sum : 1.0) || last != (is_reduced ? sum : num_ranks)) {
    fail(ErrorKind::internal,
         fmt::format("{}: {} gives {} ... {}", contestant.name(), kNames[static_cast<int>(c.operation)], first, last));
  }
}

// Seconds of each iteration, until the last rank is done. Inputs are written anew before each, as gradients are.
std::vector<double> measure(Contestant& contestant, const Case& c, int num_iterations, const Communicator& world) {
  std::vector<double> seconds;
  for (int i = 0; i < num_iterations; ++i) {
    contestant.in().fill_(world.rank() + 1);
    barrier();
    const auto start = std::chrono::steady_clock::now();
    contestant.run();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  check_result(contestant, c, world.size());
  if (MPI_Allreduce(MPI_IN_PLACE, seconds.data(), num_iterations, MPI_DOUBLE, MPI_MAX, MPI_COMM_WORLD) != MPI_SUCCESS) {
    throw std::runtime_error("MPI_Allreduce has failed");
  }
  return seconds;
}

// GB/s that all ranks together copy from memory to memory: what large tensors are up against.
double copy_rate(const Communicator& world) {
  constexpr std::int64_t kBytes = 64 << 20;
  const at::Tensor from = at::ones({kBytes}, at::kByte);
  const at::Tensor to = at::ones({kBytes}, at::kByte);
  double best = 0;
  for (int i = 0; i < 5; ++i) {
    barrier();
    const auto start = std::chrono::steady_clock::now();
    std::memcpy(to.mutable_data_ptr(), from.const_data_ptr(), kBytes);
    barrier();
    const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
    best = std::max(best, static_cast<double>(kBytes) * world.size() / seconds / 1e9);
  }
  return best;
}

double median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct CoreToCore {
  double write = 0.0;  // GB/s with which rank 0 writes a slot that rank 1 has just read,
  double read = 0.0;   // and rank 1 reads what rank 0 has just written
};

// What staging through slots is up against: every byte is written by one core and read by another, in turn.
CoreToCore core_to_core_rates(Communicator& world) {
  constexpr std::int64_t kBytes = 256 << 10;
  const at::Tensor slot = world.make_shared(kBytes, at::kByte);
  const at::Tensor own = at::ones({kBytes}, at::kByte);
  if (!slot.defined()) return {};
  std::vector<double> write;
  std::vector<double> read;
  for (int i = 0; i < 200; ++i) {
    for (const int actor : {0, 1}) {
      void* const to = (actor == 0 ? slot : own).mutable_data_ptr();
      const void* const from = (actor == 0 ? own : slot).const_data_ptr();
      barrier();
      const auto start = std::chrono::steady_clock::now();
      if (world.rank() == actor) std::memcpy(to, from, kBytes);
      barrier();
      (actor == 0 ? write : read)
          .push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
    }
  }
  return {kBytes / median(write) / 1e9, kBytes / median(read) / 1e9};
}

// Of an all_gather where every rank's part lies in memory that all have in common: saying so is all there is to do.
double gather_in_common_seconds(Communicator& world) {
  const at::Tensor word = at::zeros({1}, at::kLong);
  std::vector<double> seconds;
  for (int i = 0; i < 500; ++i) {
    barrier();
    const auto start = std::chrono::steady_clock::now();
    world.all_reduce(word, ReduceOp::max).wait();
    seconds.push_back(std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return median(seconds);
}

void run_case(const std::vector<std::unique_ptr<Contestant>>& contestants, const Case& c, Communicator& world) {
  const std::int64_t bytes = c.numel * static_cast<std::int64_t>(c10::elementSize(c.dtype));
  std::vector<std::vector<double>> seconds(contestants.size());
  for (int round = -1; round < kRounds; ++round) {  // the first warms up
    for (std::size_t i = 0; i < contestants.size(); ++i) {
      if (round == -1) contestants[i]->prepare(c);
      const auto measured = measure(*contestants[i], c, round == -1 ? 2 : iterations_per_round(bytes), world);
      if (round >= 0) seconds[i].insert(seconds[i].end(), measured.begin(), measured.end());
    }
  }
  if (world.rank() != 0) return;
  std::string line = fmt::format("| {} | {} | {} |", kNames[static_cast<int>(c.operation)],
                                 c.dtype == at::kFloat ? "fp32" : "bf16", bytes >> 10);
  std::vector<double> medians;
  for (const auto& values : seconds) {
    medians.push_back(median(values));
    line += fmt::format(" {:.1f}", medians.back() * 1e6);
    if (medians.size() > kNumPeers) {
      line += fmt::format(" ({:.1f}, {:.1f})", medians[0] / medians.back(), medians[1] / medians.back());
    }
    line += " |";
  }
  std::puts(line.c_str());
  std::fflush(stdout);
}

void run(Communicator& world, const Arguments& arguments) {
  std::string file = (std::filesystem::temp_directory_path() / fmt::format("shardtune_gloo_{}", ::getpid())).string();
  file = broadcast_string(world, file, 0);
  std::vector<std::unique_ptr<Contestant>> contestants;
  contestants.push_back(make_mpi_contestant(world.size()));
  contestants.push_back(make_gloo_contestant(world.rank(), world.size(), file));
  for (const bool in_buffers : {false, true}) {
    for (const bool is_direct : {false, true}) {
      contestants.push_back(make_own_contestant(world, {in_buffers, is_direct}, arguments.max_bytes));
    }
  }
  const double rate = copy_rate(world);
  const CoreToCore crossing = core_to_core_rates(world);
  const double in_common = gather_in_common_seconds(world);
  if (world.rank() == 0) {
    std::printf("%d ranks, own over %s; median microseconds (times as fast as Open MPI, as gloo)\n", world.size(),
                describe_transport(world).c_str());
    std::printf(
        "all ranks together copy %.1f GB/s in memory; a slot is written with %.1f and read by another core with %.1f "
        "GB/s;\n"
        "gathering in memory that the ranks have in common takes %.1f microseconds at any size\n\n",
        rate, crossing.write, crossing.read, in_common * 1e6);
    std::string head = "| operation | dtype | KiB |";
    std::string rule = "|---|---|---|";
    for (const auto& contestant : contestants) {
      head += " " + contestant->name() + " |";
      rule += "---|";
    }
    std::printf("%s\n%s\n", head.c_str(), rule.c_str());
  }
  for (const Operation operation : arguments.operations) {
    for (const auto dtype : {at::kFloat, at::kBFloat16}) {
      for (std::int64_t bytes = 64 << 10; bytes <= arguments.max_bytes; bytes *= bytes >= (4 << 20) ? 8 : 4) {
        run_case(contestants, {operation, dtype, bytes / static_cast<std::int64_t>(c10::elementSize(dtype))}, world);
      }
    }
  }
  world.barrier();
  if (world.rank() == 0) std::filesystem::remove(file);
}

}  // namespace
}  // namespace shardtune::benchmark

int main(int argc, char** argv) {
  using namespace shardtune;
  MpiEnvironment environment(&argc, &argv);
  try {
    const benchmark::Arguments arguments = benchmark::parse(argc, argv);
    const auto world = environment.world();
    benchmark::run(*world, arguments);
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "rank %d: %s\n", environment.rank(), error.what());
    environment.abort(1);
  }
}
