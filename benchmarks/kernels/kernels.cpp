// See README.md in this folder.
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <functional>
#include <limits>
#include <memory>
#include <string>
#include <string_view>
#include <vector>


#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "core/allocator.hpp"
#include "kernels/activation.hpp"
#include "kernels/attention.hpp"
#include "kernels/bf16_gemm.hpp"
#include "kernels/cross_entropy.hpp"
#include "kernels/dropout.hpp"
#include "kernels/gated_mlp.hpp"
#include "kernels/instruction_set.hpp"
#include "kernels/norm.hpp"

namespace shardtune::benchmark {
namespace {

using Tensors = std::vector<at::Tensor>;
using Operator = std::function<at::Tensor(const Tensors&)>;

struct Row {
  std::string name;
  Tensors inputs;
  Operator own, aten;
};

double seconds_of(const std::function<void()>& work) {
  const auto start = std::chrono::steady_clock::now();
  work();
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}

double forward(const Operator& op, const Tensors& inputs) {
  const at::NoGradGuard no_grad;
  return seconds_of([&] { op(inputs); });
}

double both(const Operator& op, const Tensors& inputs, at::Tensor& seed) {
  Tensors leaves;
  for (const at::Tensor& input : inputs)
    leaves.push_back(input.is_floating_point() ? input.detach().requires_grad_(true) : input);
  return seconds_of([&] {
    const at::Tensor out = op(leaves);
    if (!seed.defined()) seed = at::randn(out.sizes(), out.options().requires_grad(false));
    out.backward(out.dim() == 0 ? at::Tensor() : seed);
  });
}

void measure(const Row& row, double budget) {
  double best[2][2];  // own, ATen; forward, both
  for (auto& side : best) std::fill(std::begin(side), std::end(side), std::numeric_limits<double>::infinity());
  at::Tensor seed;
  double spent = 0;
  for (int round = 0; round < 3 || (spent < budget && round < 200); ++round)
    for (int side = 0; side < 2; ++side) {
      const Operator& op = side == 0 ? row.own : row.aten;
      const double times[] = {forward(op, row.inputs), both(op, row.inputs, seed)};
      for (int i = 0; i < 2; ++i) {
        best[side][i] = std::min(best[side][i], times[i]);
        spent += times[i];
      }
    }
  std::printf("| %s | %.2f | %.2f | %.1f | %.2f | %.2f | %.1f |\n", row.name.c_str(), best[0][0] * 1e3,
              best[1][0] * 1e3, best[1][0] / best[0][0], best[0][1] * 1e3, best[1][1] * 1e3, best[1][1] / best[0][1]);
  std::fflush(stdout);
}

at::Tensor numbers(std::vector<std::int64_t> shape, at::ScalarType dtype) {
  return at::randn(shape, at::kFloat).to(dtype);
}

// Equal segments, so that ATen needs neither padding nor a mask.
Row attention(const char* name, std::int64_t segments, std::int64_t length, std::int64_t heads, std::int64_t size,
              bool is_causal, double dropout, at::ScalarType dtype) {
  std::vector<std::int64_t> offsets;
  for (std::int64_t s = 0; s <= segments; ++s) offsets.push_back(s * length);
  const AttentionOptions options{.segment_offsets = std::make_shared<const std::vector<std::int64_t>>(offsets),
                                 .is_causal = is_causal,
                                 .scale = 1 / std::sqrt(static_cast<double>(size)),
                                 .dropout = {.probability = dropout, .key = 1}};
  const at::Tensor fused = numbers({segments * length, 3, heads, size}, dtype);
  return {name,
          {fused},
          [=](const Tensors& in) {
            return varlen_attention(in[0].select(1, 0), in[0].select(1, 1), in[0].select(1, 2), options);
          },
          [=](const Tensors& in) {
            const auto part = [&](std::int64_t i) {
              return in[0].select(1, i).view({segments, length, heads, size}).transpose(1, 2);
            };
            return at::scaled_dot_product_attention(part(0), part(1), part(2), {}, dropout, is_causal)
                .transpose(1, 2)
                .reshape({segments * length, heads, size});
          }};
}

std::vector<Row> rows() {
  std::vector<Row> all;
  all.push_back(attention("attention 4 x 1024, 12 x 64, causal, bf16", 4, 1024, 12, 64, true, 0, at::kBFloat16));
  all.push_back(
      attention("attention 4 x 1024, 12 x 64, causal, bf16, dropout", 4, 1024, 12, 64, true, 0.1, at::kBFloat16));
  all.push_back(attention("attention 4 x 1024, 12 x 64, causal, fp32", 4, 1024, 12, 64, true, 0, at::kFloat));
  all.push_back(attention("attention 32 x 25, 12 x 32, bf16", 32, 25, 12, 32, false, 0, at::kBFloat16));
  all.push_back(attention("attention 32 x 25, 12 x 32, bf16, dropout", 32, 25, 12, 32, false, 0.1, at::kBFloat16));
  all.push_back(attention("attention 32 x 25, 12 x 32, fp32", 32, 25, 12, 32, false, 0, at::kFloat));
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
    const std::string suffix = dtype == at::kFloat ? ", fp32" : ", bf16";
    const at::Tensor wide = numbers({4096, 3072}, dtype), x = numbers({4096, 768}, dtype), w = numbers({768}, dtype);
    all.push_back({"gelu tanh [4096, 3072]" + suffix,
                   {wide},
                   [](const Tensors& in) { return activate(in[0], Activation::gelu_tanh); },
                   [](const Tensors& in) { return at::gelu(in[0], "tanh"); }});
    all.push_back({"gelu erf [4096, 3072]" + suffix,
                   {wide},
                   [](const Tensors& in) { return activate(in[0], Activation::gelu_erf); },
                   [](const Tensors& in) { return at::gelu(in[0]); }});
    all.push_back({"silu and mul [4096, 3072]" + suffix,
                   {wide, wide + 1},
                   [](const Tensors& in) { return silu_and_mul(in[0], in[1]); },
                   [](const Tensors& in) { return at::silu(in[0]) * in[1]; }});
    all.push_back({"layer norm [4096, 768]" + suffix,
                   {x, w, w},
                   [](const Tensors& in) { return layer_norm(in[0], in[1], in[2], 1e-5); },
                   [](const Tensors& in) { return at::layer_norm(in[0], {768}, in[1], in[2], 1e-5); }});
    all.push_back({"rms norm [4096, 768]" + suffix,
                   {x, w},
                   [](const Tensors& in) { return rms_norm(in[0], in[1], 1e-5); },
                   [](const Tensors& in) { return at::rms_norm(in[0], {768}, in[1], 1e-5); }});
    all.push_back({"dropout [4096, 768]" + suffix,
                   {x},
                   [](const Tensors& in) { return dropout(in[0], {.probability = 0.1, .key = 1}); },
                   [](const Tensors& in) { return at::dropout(in[0], 0.1, true); }});
    all.push_back(
        {"head and loss 4096 x 768 x 50257" + suffix,
         {x, numbers({50257, 768}, dtype), at::randint(50257, {4096}, at::kLong)},
         [](const Tensors& in) { return linear_cross_entropy_sum(in[0], in[1], in[2], {.loss_scale = 1e-3}); },
         [](const Tensors& in) { return at::cross_entropy_loss(at::mm(in[0], in[1].t()), in[2]); }});
  }
  return all;
}

// Rates of y = x W^T, dx = dy W and dW = dy^T x, own products and ATen's in turn.
void products(std::int64_t tokens, std::int64_t in, std::int64_t out, double budget) {
  const at::NoGradGuard no_grad;
  const at::Tensor x = numbers({tokens, in}, at::kBFloat16), w = numbers({out, in}, at::kBFloat16),
                   y = numbers({tokens, out}, at::kBFloat16);
  const std::pair<at::Tensor, at::Tensor> all[] = {{x, w.t()}, {y, w}, {y.t(), x}};
  std::printf("| %ld x %ld x %ld |", tokens, in, out);
  for (const auto& [left, right] : all) {
    double best[2] = {std::numeric_limits<double>::infinity(), std::numeric_limits<double>::infinity()}, spent = 0;
    for (int round = 0; round < 3 || (spent < budget / 3 && round < 200); ++round)
      for (int side = 0; side < 2; ++side) {
        const double time = seconds_of([&] { side == 0 ? bf16_gemm(left, right) : at::mm(left, right); });
        best[side] = std::min(best[side], time);
        spent += time;
      }
    const double operations = 2e-9 * static_cast<double>(tokens * in * out);
    std::printf(" %.0f | %.0f |", operations / best[0], operations / best[1]);
  }
  std::printf("\n");
  std::fflush(stdout);
}

}  // namespace
}  // namespace shardtune::benchmark

int main(int argc, char** argv) {
  using namespace shardtune::benchmark;
  shardtune::tune_allocator();
  const double budget = argc > 1 ? std::atof(argv[1]) : 1.0;
  const std::string_view pattern = argc > 2 ? argv[2] : "";
  std::printf(
      "%d threads, own kernels for %s; ms\n\n| operator | forward, own | ATen | times | both, own | ATen | times "
      "|\n|---|---|---|---|---|---|---|\n",
      at::get_num_threads(), shardtune::name_of(shardtune::instruction_set()));
  for (const Row& row : rows())
    if (row.name.find(pattern) != std::string::npos) measure(row, budget);
  if (std::string_view("products").find(pattern) == std::string_view::npos ||
      shardtune::instruction_set() < shardtune::InstructionSet::avx512_bf16)
    return 0;
  std::printf(
      "\nbf16 matrix products, GFLOP/s\n\n| tokens x in x out | y, own | ATen | dx, own | ATen | dW, own | ATen |\n"
      "|---|---|---|---|---|---|---|\n");
  for (const auto& [in, out] : {std::pair{768, 2304}, {768, 768}, {768, 3072}, {3072, 768}, {768, 50257}})
    products(out > 50000 ? 1024 : 4096, in, out, budget);
  products(784, 384, 1536, budget);
  return 0;
}
