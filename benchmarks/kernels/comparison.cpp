#include "benchmarks/kernels/comparison.hpp"

#include <utility>

#include <ATen/ATen.h>
#include <ATen/core/grad_mode.h>
#include <benchmark/benchmark.h>
#include <torch/csrc/autograd/autograd.h>

namespace shardtune::measurement {
namespace {

using ::benchmark::Counter;
using ::benchmark::State;
using Body = std::function<void(State&, const Tensors&, const Operator&)>;

// Body makes one call before the counted ones: what a first call does once (memory, compiled code) is not measured.
void add(const Comparison& comparison, const std::string& pass, const Work& work, const Body& body) {
  for (const auto& [side, op] : {std::pair{"own", comparison.own}, {"aten", comparison.aten}}) {
    const auto run = [=, op = op, make_inputs = comparison.make_inputs](State& state) {
      body(state, make_inputs(), op);
      if (work.flops > 0) state.counters["FLOP/s"] = Counter(work.flops, Counter::kIsIterationInvariantRate);
      if (work.bytes > 0) state.counters["bytes/s"] = Counter(work.bytes, Counter::kIsIterationInvariantRate);
    };
    ::benchmark::RegisterBenchmark((comparison.name + "/" + pass + "/" + side).c_str(), run)
        ->UseRealTime()
        ->Unit(::benchmark::kMillisecond);
  }
}

at::Tensor gradient_for(const at::Tensor& out) {
  return out.dim() == 0 ? at::ones_like(out) : at::randn(out.sizes(), at::kFloat).to(out.scalar_type());
}

}  // namespace

void add_forward(const Comparison& comparison, const Work& work) {
  add(comparison, "forward", work, [](State& state, const Tensors& inputs, const Operator& op) {
    const at::NoGradGuard no_grad;
    op(inputs);
    for (auto _ : state) ::benchmark::DoNotOptimize(op(inputs).data_ptr());
  });
}

void add_forward_and_backward(const Comparison& comparison, const Work& work) {
  add(comparison, "both", work, [](State& state, const Tensors& inputs, const Operator& op) {
    Tensors arguments, leaves;
    for (const at::Tensor& input : inputs) {
      arguments.push_back(input.is_floating_point() ? input.detach().requires_grad_(true) : input);
      if (input.is_floating_point()) leaves.push_back(arguments.back());
    }
    const at::Tensor gradient = gradient_for(op(arguments).detach());
    const auto both = [&] { return torch::autograd::grad({op(arguments)}, leaves, {gradient}); };
    both();
    for (auto _ : state) ::benchmark::DoNotOptimize(both().front().data_ptr());
  });
}

void add_gradient(const Comparison& comparison, const std::string& pass, std::size_t wanted, const Work& work) {
  add(comparison, pass, work, [wanted](State& state, const Tensors& inputs, const Operator& op) {
    Tensors arguments = inputs;
    arguments[wanted] = inputs[wanted].detach().requires_grad_(true);
    const at::Tensor out = op(arguments), gradient = gradient_for(out.detach());
    const auto backward = [&] {
      return torch::autograd::grad({out}, {arguments[wanted]}, {gradient}, /*retain_graph=*/true);
    };
    backward();
    for (auto _ : state) ::benchmark::DoNotOptimize(backward().front().data_ptr());
  });
}

at::Tensor random_numbers(const std::vector<std::int64_t>& shape, at::ScalarType dtype, double deviation) {
  return at::randn(shape, at::kFloat).mul_(deviation).to(dtype);
}

std::string name_of(at::ScalarType dtype) { return dtype == at::kFloat ? "fp32" : "bf16"; }

}  // namespace shardtune::measurement
