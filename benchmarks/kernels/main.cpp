// See README.md in this folder.
#include <string>

#include <ATen/Parallel.h>
#include <benchmark/benchmark.h>

#include "benchmarks/kernels/comparison.hpp"
#include "core/allocator.hpp"
#include "kernels/instruction_set.hpp"

int main(int argc, char** argv) {
  using namespace shardtune;
  tune_allocator();
  ::benchmark::Initialize(&argc, argv);
  if (::benchmark::ReportUnrecognizedArguments(argc, argv)) return 2;
  ::benchmark::AddCustomContext("threads", std::to_string(at::get_num_threads()));
  ::benchmark::AddCustomContext("instruction_set", name_of(instruction_set()));
  measurement::add_peaks();
  measurement::add_linear();
  measurement::add_attention();
  measurement::add_operators();
  const bool has_run = ::benchmark::RunSpecifiedBenchmarks() > 0;
  ::benchmark::Shutdown();
  return has_run ? 0 : 2;
}
