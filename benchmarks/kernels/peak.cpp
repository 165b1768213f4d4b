// The machine's limits, on all threads at once: products in registers and from the first-level cache, copying in
// memory.
#include <memory>
#include <random>
#include <utility>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>
#include <c10/util/BFloat16.h>

#include "benchmarks/kernels/comparison.hpp"
#include "benchmarks/kernels/peak_loops.hpp"
#include "kernels/instruction_set.hpp"

namespace shardtune::measurement {
namespace {

using ::benchmark::Counter;
using ::benchmark::State;

constexpr std::int64_t kRounds = 4000;  // a call takes milliseconds: waking threads costs little of it

std::unique_ptr<Numbers> make_numbers(unsigned seed) {
  auto numbers = std::make_unique<Numbers>();
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  for (std::uint16_t& number : numbers->bf16) number = c10::BFloat16(normal(generator)).x;
  for (float& number : numbers->fp32) number = normal(generator);
  return numbers;
}

void run_loop(State& state, const PeakLoop& loop) {
  const int num_threads = at::get_num_threads();
  std::vector<std::unique_ptr<Numbers>> numbers;
  for (int thread = 0; thread < num_threads; ++thread) numbers.push_back(make_numbers(static_cast<unsigned>(thread)));
  for (auto _ : state)
    at::parallel_for(0, num_threads, 1, [&](std::int64_t begin, std::int64_t end) {
      for (std::int64_t thread = begin; thread < end; ++thread)
        ::benchmark::DoNotOptimize(loop.run(*numbers[static_cast<std::size_t>(thread)], kRounds));
    });
  state.counters["FLOP/s"] =
      Counter(loop.flops_of_round * static_cast<double>(kRounds * num_threads), Counter::kIsIterationInvariantRate);
}

// Counts bytes read and bytes written.
void run_copy(State& state) {
  constexpr std::int64_t size = 128 << 20, piece = 1 << 20;
  const at::Tensor from = at::ones({size}, at::kByte), into = at::zeros({size}, at::kByte);
  const char* source = reinterpret_cast<const char*>(from.const_data_ptr<std::uint8_t>());
  char* target = reinterpret_cast<char*>(into.mutable_data_ptr<std::uint8_t>());
  for (auto _ : state)
    at::parallel_for(0, size / piece, 1, [&](std::int64_t begin, std::int64_t end) {
      copy_past_caches(source + begin * piece, target + begin * piece, (end - begin) * piece);
    });
  state.counters["bytes/s"] = Counter(2.0 * size, Counter::kIsIterationInvariantRate);
}

void add_peak(const std::string& name, const PeakLoop& registers, const PeakLoop& l1) {
  for (const auto& [where, loop] : {std::pair{"/registers", registers}, {"/l1", l1}})
    ::benchmark::RegisterBenchmark(("peak/" + name + where).c_str(),
                                   [loop = loop](State& state) { run_loop(state, loop); })
        ->UseRealTime()
        ->Unit(::benchmark::kMillisecond);
}

}  // namespace

void add_peaks() {
  const InstructionSet set = instruction_set();
  if (set >= InstructionSet::amx) add_peak("amx_bf16", kAmxRegisters, kAmxL1);
  if (set >= InstructionSet::avx512_bf16) add_peak("avx512_bf16", kAvx512Bf16Registers, kAvx512Bf16L1);
  if (set >= InstructionSet::avx512) add_peak("avx512_fp32", kAvx512Fp32Registers, kAvx512Fp32L1);
  if (set >= InstructionSet::avx2 && __builtin_cpu_supports("fma"))
    add_peak("avx2_fp32", kAvx2Fp32Registers, kAvx2Fp32L1);
  ::benchmark::RegisterBenchmark("peak/memory/copy", run_copy)->UseRealTime()->Unit(::benchmark::kMillisecond);
}

}  // namespace shardtune::measurement
