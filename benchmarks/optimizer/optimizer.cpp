// See README.md in this folder.
#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "kernels/adamw.hpp"
#include "kernels/instruction_set.hpp"
#include "kernels/sgd.hpp"

namespace shardtune::benchmark {
namespace {

struct Loop {
  std::string name;
  double bytes_per_element;
  std::function<void()> run;
  double best_seconds = std::numeric_limits<double>::infinity();
};

constexpr std::int64_t kGrain = 1 << 15;

float read_all(const at::Tensor& tensor) {
  const float* values = tensor.const_data_ptr<float>();
  return at::parallel_reduce(
      0, tensor.numel(), kGrain, 0.0F,
      [&](std::int64_t begin, std::int64_t end, float start) {
        float lanes[64] = {};
        std::int64_t i = begin;
        for (; i + 64 <= end; i += 64)
          for (int lane = 0; lane < 64; ++lane) lanes[lane] += values[i + lane];
        for (const float lane : lanes) start += lane;
        return start;
      },
      [](float a, float b) { return a + b; });
}

std::vector<Loop> make_loops(std::int64_t numel) {
  const auto numbers = [&] { return at::full({numel}, 0.01, at::kFloat); };
  const at::Tensor a = numbers(), b = numbers();
  std::vector<Loop> loops;
  const at::Tensor sum = at::zeros({1});
  loops.push_back({"read", 4, [=] { sum.mutable_data_ptr<float>()[0] = read_all(a); }});
  loops.push_back({"copy", 8, [=] {
                     at::parallel_for(0, numel, kGrain, [&](std::int64_t begin, std::int64_t end) {
                       std::memcpy(b.mutable_data_ptr<float>() + begin, a.const_data_ptr<float>() + begin,
                                   static_cast<std::size_t>(end - begin) * sizeof(float));
                     });
                   }});
  loops.push_back({"a += b", 12, [=] { at::Tensor(a).add_(b, 0.01); }});
  const AdamWSlice fp32{numbers(), numbers(), numbers(), b};
  loops.push_back({"AdamW fp32", 28, [=] { adamw_step(fp32, {.weight_decay = 0.01, .step = 10}); }});
  const AdamWSlice bf16{fp32.param, at::zeros({numel}, at::kBFloat16), at::zeros({numel}, at::kBFloat16), b};
  loops.push_back({"AdamW bf16 moments", 20, [=] { adamw_step(bf16, {.weight_decay = 0.01, .step = 10}); }});
  const SgdSlice momentum{fp32.param, fp32.exp_avg, b};
  loops.push_back({"SGD momentum", 20, [=] { sgd_step(momentum, {.momentum = 0.9, .weight_decay = 0.01}); }});
  loops.push_back({"SGD", 12, [=] { sgd_step({fp32.param, {}, b}, {.weight_decay = 0.01}); }});
  return loops;
}

}  // namespace
}  // namespace shardtune::benchmark

int main(int argc, char** argv) {
  using namespace shardtune::benchmark;
  const std::int64_t numel = (argc > 1 ? std::atoll(argv[1]) : 64) * 1'000'000;
  std::vector<Loop> loops = make_loops(numel);
  for (int round = 0; round < 9; ++round) {
    for (Loop& loop : loops) {
      const auto start = std::chrono::steady_clock::now();
      loop.run();
      const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
      loop.best_seconds = std::min(loop.best_seconds, seconds);
    }
  }
  constexpr int kNumPlain = 3;
  const auto rate = [&](const Loop& loop) {
    return loop.bytes_per_element * static_cast<double>(numel) / loop.best_seconds;
  };
  double bandwidth = 0.0;
  for (int i = 0; i < kNumPlain; ++i) bandwidth = std::max(bandwidth, rate(loops[static_cast<std::size_t>(i)]));
  std::printf("%lld million parameters, %d threads, %s\n", static_cast<long long>(numel / 1'000'000),
              at::get_num_threads(), shardtune::name_of(shardtune::instruction_set()));
  std::printf("%-20s %8s %8s %14s\n", "loop", "ms", "GB/s", "of bandwidth %");
  for (const Loop& loop : loops)
    std::printf("%-20s %8.2f %8.2f %14.1f\n", loop.name.c_str(), 1e3 * loop.best_seconds, 1e-9 * rate(loop),
                100.0 * rate(loop) / bandwidth);
  return 0;
}
