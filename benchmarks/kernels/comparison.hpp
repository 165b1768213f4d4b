#pragma once
// A task that an operator of kernels/ and ATen both do, registered with Google Benchmark: NAME/PASS/own and
// NAME/PASS/aten. Inputs are made anew for every run of a benchmark, so that only those of the running one exist.
// Results carry the rates FLOP/s and bytes/s where the work is known. One thread registers and runs all.
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

namespace shardtune::measurement {

using Tensors = std::vector<at::Tensor>;
using Operator = std::function<at::Tensor(const Tensors&)>;

struct Comparison {
  std::string name;                      // FAMILY/SIZES/DTYPE
  std::function<Tensors()> make_inputs;  // random numbers, no gradient wanted
  Operator own, aten;
};

// Of one call; 0: not counted.
struct Work {
  double flops = 0, bytes = 0;
};

// NAME/forward/SIDE: without a graph.
void add_forward(const Comparison& comparison, const Work& work);
// NAME/both/SIDE: forward and backward pass, gradients of all floating inputs.
void add_forward_and_backward(const Comparison& comparison, const Work& work);
// NAME/PASS/SIDE: the part of the backward pass that makes the gradient of input number `wanted`.
void add_gradient(const Comparison& comparison, const std::string& pass, std::size_t wanted, const Work& work);

// Of normal distribution with this deviation.
at::Tensor random_numbers(const std::vector<std::int64_t>& shape, at::ScalarType dtype, double deviation = 1);
std::string name_of(at::ScalarType dtype);  // bf16 or fp32

// One for each source of this folder.
void add_attention();
void add_linear();
void add_operators();
void add_peaks();

}  // namespace shardtune::measurement
