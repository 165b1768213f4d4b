// Operators that pass over memory, at the sizes of GPT-2 124M; and the head with its loss.
#include <ATen/ATen.h>

#include "benchmarks/kernels/comparison.hpp"
#include "kernels/activation.hpp"
#include "kernels/cross_entropy.hpp"
#include "kernels/dropout.hpp"
#include "kernels/embedding.hpp"
#include "kernels/gated_mlp.hpp"
#include "kernels/norm.hpp"
#include "kernels/rope.hpp"

namespace shardtune::measurement {
namespace {

constexpr std::int64_t kTokens = 4096, kHidden = 768, kWide = 3072, kHeads = 12, kVocabulary = 50257;

// How often a pass reads or writes as much as the first input holds, at least: operands, results, gradients.
struct Passes {
  double forward, both;
};

void add_streaming(const Comparison& comparison, std::int64_t numel, at::ScalarType dtype, const Passes& passes) {
  const double bytes = static_cast<double>(numel) * at::elementSize(dtype);
  add_forward(comparison, {.bytes = passes.forward * bytes});
  add_forward_and_backward(comparison, {.bytes = passes.both * bytes});
}

void add_activations(at::ScalarType dtype) {
  const std::string sizes = "/4096x3072/" + name_of(dtype);
  const auto one = [=] { return Tensors{random_numbers({kTokens, kWide}, dtype)}; };
  const auto two = [=] { return Tensors{random_numbers({kTokens, 2 * kWide}, dtype)}; };
  add_streaming({"gelu_tanh" + sizes, one, [](const Tensors& in) { return activate(in[0], Activation::gelu_tanh); },
                 [](const Tensors& in) { return at::gelu(in[0], "tanh"); }},
                kTokens * kWide, dtype, {2, 5});
  add_streaming({"gelu_erf" + sizes, one, [](const Tensors& in) { return activate(in[0], Activation::gelu_erf); },
                 [](const Tensors& in) { return at::gelu(in[0]); }},
                kTokens * kWide, dtype, {2, 5});
  add_streaming({"silu_and_mul" + sizes, two, [](const Tensors& in) { return silu_and_mul(in[0]); },
                 [](const Tensors& in) { return at::silu(in[0].narrow(1, 0, kWide)) * in[0].narrow(1, kWide, kWide); }},
                kTokens * kWide, dtype, {3, 8});
}

void add_norms(at::ScalarType dtype) {
  const std::string sizes = "/4096x768/" + name_of(dtype);
  const auto inputs = [=] {
    return Tensors{random_numbers({kTokens, kHidden}, dtype), random_numbers({kHidden}, dtype),
                   random_numbers({kHidden}, dtype)};
  };
  const auto without_bias = [=] {
    Tensors made = inputs();
    made.pop_back();
    return made;
  };
  add_streaming({"layer_norm" + sizes, inputs, [](const Tensors& in) { return layer_norm(in[0], in[1], in[2], 1e-5); },
                 [](const Tensors& in) { return at::layer_norm(in[0], {kHidden}, in[1], in[2], 1e-5); }},
                kTokens * kHidden, dtype, {2, 5});
  add_streaming({"rms_norm" + sizes, without_bias, [](const Tensors& in) { return rms_norm(in[0], in[1], 1e-5); },
                 [](const Tensors& in) { return at::rms_norm(in[0], {kHidden}, in[1], 1e-5); }},
                kTokens * kHidden, dtype, {2, 5});
}

// Where the output of a sublayer joins the residual stream.
void add_residual_sums(at::ScalarType dtype) {
  const std::string sizes = "/4096x768/" + name_of(dtype);
  const auto two = [=] {
    return Tensors{random_numbers({kTokens, kHidden}, dtype), random_numbers({kTokens, kHidden}, dtype)};
  };
  const auto with_weights = [=] {
    return Tensors{random_numbers({kTokens, kHidden}, dtype), random_numbers({kTokens, kHidden}, dtype),
                   random_numbers({kHidden}, dtype), random_numbers({kHidden}, dtype)};
  };
  for (const double p : {0.0, 0.1}) {
    const auto own = [=](const Tensors& in) {
      return add_layer_norm({in[0], in[1], {.probability = p, .key = 1}}, in[2], in[3], 1e-5).normed;
    };
    const auto aten = [=](const Tensors& in) {
      return at::layer_norm(in[0] + at::dropout(in[1], p, p > 0), {kHidden}, in[2], in[3], 1e-5);
    };
    add_streaming({(p > 0 ? "residual_dropout_norm" : "residual_norm") + sizes, with_weights, own, aten},
                  kTokens * kHidden, dtype, {3, p > 0 ? 8.0 : 7.0});
  }
  add_streaming({"residual_dropout" + sizes, two,
                 [](const Tensors& in) { return add_dropout(in[0], in[1], {.probability = 0.1, .key = 1}); },
                 [](const Tensors& in) { return in[0] + at::dropout(in[1], 0.1, true); }},
                kTokens * kHidden, dtype, {3, 5});
}

void add_dropout_and_rope(at::ScalarType dtype) {
  constexpr std::int64_t head_size = kHidden / kHeads;
  add_streaming({"dropout/4096x768/" + name_of(dtype),
                 [=] {
                   return Tensors{random_numbers({kTokens, kHidden}, dtype)};
                 },
                 [](const Tensors& in) { return dropout(in[0], {.probability = 0.1, .key = 1}); },
                 [](const Tensors& in) { return at::dropout(in[0], 0.1, true); }},
                kTokens * kHidden, dtype, {2, 4});
  const RopeTables tables = make_rope_tables(
      at::arange(kTokens, at::kLong), at::pow(10000.0, at::arange(0, head_size, 2, at::kFloat) / -double(head_size)));
  // As transformers' apply_rotary_pos_emb: tables of the whole head, in the dtype of x.
  const auto whole = [=](const at::Tensor& half) { return at::cat({half, half}, 1).unsqueeze(1).to(dtype); };
  const at::Tensor cos = whole(tables.cos), sin = whole(tables.sin);
  add_streaming({"rope/4096x12x64/" + name_of(dtype),
                 [=] {
                   return Tensors{random_numbers({kTokens, kHeads, head_size}, dtype)};
                 },
                 [=](const Tensors& in) { return rope(in[0], tables); },
                 [=](const Tensors& in) {
                   const Tensors halves = in[0].chunk(2, -1);
                   return in[0] * cos + at::cat({-halves[1], halves[0]}, -1) * sin;
                 }},
                kTokens * kHidden, dtype, {2, 4});
}

// Most words of a text are few: ids are squares of random numbers.
void add_embedding(at::ScalarType dtype) {
  add_streaming({"embedding/4096of50257x768/" + name_of(dtype),
                 [=] {
                   const at::Tensor ids = (at::rand({kTokens}).square() * double(kVocabulary)).to(at::kLong);
                   return Tensors{random_numbers({kVocabulary, kHidden}, dtype), ids.clamp_max_(kVocabulary - 1)};
                 },
                 [](const Tensors& in) { return embedding_lookup(in[1], in[0]); },
                 [](const Tensors& in) { return at::embedding(in[0], in[1]); }},
                // Backward writes the gradient of the whole table, in fp32 as the own one does or in the dtype.
                kTokens * kHidden, dtype, {2, 5 + double(kVocabulary) / double(kTokens)});
}

void add_head(at::ScalarType dtype) {
  const Comparison comparison{
      "head_and_loss/4096x768x50257/" + name_of(dtype),
      [=] {
        return Tensors{random_numbers({kTokens, kHidden}, dtype), random_numbers({kVocabulary, kHidden}, dtype, 0.02),
                       at::randint(kVocabulary, {kTokens}, at::kLong)};
      },
      [](const Tensors& in) { return linear_cross_entropy_sum(in[0], in[1], in[2], {.loss_scale = 1.0 / kTokens}); },
      [](const Tensors& in) { return at::cross_entropy_loss(at::mm(in[0], in[1].t()), in[2]); }};
  const double product = 2.0 * static_cast<double>(kTokens * kHidden * kVocabulary);
  add_forward(comparison, {.flops = product});
  add_forward_and_backward(comparison, {.flops = 3 * product});
}

}  // namespace

void add_operators() {
  for (const at::ScalarType dtype : {at::kBFloat16, at::kFloat}) {
    add_activations(dtype);
    add_norms(dtype);
    add_residual_sums(dtype);
    add_dropout_and_rope(dtype);
    add_embedding(dtype);
    add_head(dtype);
  }
}

}  // namespace shardtune::measurement
