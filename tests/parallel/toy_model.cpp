#include "tests/parallel/toy_model.hpp"

#include <algorithm>
#include <functional>
#include <memory>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/variable.h>

#include "core/hash.hpp"
#include "core/rng.hpp"
#include "kernels/attention.hpp"

namespace shardtune::toy {
namespace {

constexpr std::int64_t kVocabulary = 101;
constexpr std::int64_t kWidth = 40;
constexpr std::int64_t kInner = 72;
constexpr std::int64_t kPositions = 13;

Tensors micro_batch_gradients(Model& model, std::int64_t index) {
  PlainRunner runner;
  torch::autograd::backward({model.loss(make_batch(0, index), runner)}, {});
  Tensors gradients;
  for (Parameter* p : model.parameters()) {
    if (!p->is_trainable) continue;
    gradients[p->name] = p->value.grad().clone();
    p->value.mutable_grad().reset();
  }
  return gradients;
}

// One segment, two heads of width 20; queries, keys and values are the same.
at::Tensor attend(const at::Tensor& x_TD, const std::shared_ptr<RecomputeContext>& context) {
  const at::Tensor x_THK = x_TD.view({-1, 2, kWidth / 2});
  const auto offsets = std::make_shared<const std::vector<std::int64_t>>(std::vector<std::int64_t>{0, x_TD.size(0)});
  return varlen_attention(
      x_THK, x_THK, x_THK,
      {.segment_offsets = offsets, .is_causal = true, .scale = 0.25, .dropout = {}, .recompute = context});
}

Tensors tree_sum(const std::vector<Tensors>& leaves, std::size_t begin, std::size_t width) {
  if (width == 1) return leaves[begin];
  const std::size_t half = width / 2;
  Tensors sum = tree_sum(leaves, begin, half);
  if (begin + half >= leaves.size()) return sum;
  for (const auto& [name, right] : tree_sum(leaves, begin + half, half)) sum[name] = sum[name] + right;
  return sum;
}

}  // namespace

Batch make_batch(std::int64_t step, std::int64_t micro_batch) {
  PhiloxStream random(mix_key(7, static_cast<std::uint64_t>(step), static_cast<std::uint64_t>(micro_batch)));
  const auto tokens = static_cast<std::int64_t>(5 + random.next_below(8));
  Batch batch{at::empty({tokens}, at::kLong), at::empty({tokens}, at::kLong)};
  for (std::int64_t t = 0; t < tokens; ++t) {
    batch.ids_T.mutable_data_ptr<std::int64_t>()[t] = static_cast<std::int64_t>(random.next_below(kVocabulary));
    batch.labels_T.mutable_data_ptr<std::int64_t>()[t] = static_cast<std::int64_t>(random.next_below(kVocabulary));
  }
  return batch;
}

Parameter* Model::add(Unit& unit, const std::string& name, std::vector<std::int64_t> shape, bool is_trainable) {
  Parameter& parameter = parameters_.emplace_back();
  parameter.name = name;
  parameter.shape = std::move(shape);
  parameter.is_norm = name.find("norm") != std::string::npos;
  parameter.is_trainable = is_trainable;
  unit.parameters.push_back(&parameter);
  return &parameter;
}

Model::Model(Frozen frozen, int num_blocks) {
  const bool one_block = frozen == Frozen::all_but_one_block;
  Unit& root = units_.emplace_back();
  root.name = "root";
  root.is_root = true;
  add(root, "embed.weight", {kVocabulary, kWidth}, frozen != Frozen::embeddings && !one_block);
  add(root, "positions.weight", {kPositions, kWidth}, frozen == Frozen::nothing);
  add(root, "final_norm.weight", {kWidth}, !one_block);
  for (int i = 0; i < num_blocks; ++i) {
    Unit& block = units_.emplace_back();
    block.name = "block." + std::to_string(i);
    const bool is_trainable = !one_block || i == 1;
    add(block, block.name + ".norm.weight", {kWidth}, is_trainable);
    add(block, block.name + ".norm.bias", {kWidth}, is_trainable);
    add(block, block.name + ".up.weight", {kInner, kWidth}, is_trainable);
    add(block, block.name + ".up.bias", {kInner}, is_trainable);
    add(block, block.name + ".down.weight", {kWidth, kInner}, is_trainable && i != 2);  // frozen inside a unit
  }
}

std::vector<Unit*> Model::units() {
  std::vector<Unit*> units;
  for (Unit& unit : units_) units.push_back(&unit);
  return units;
}

std::vector<Parameter*> Model::parameters() {
  std::vector<Parameter*> parameters;
  for (Parameter& parameter : parameters_) parameters.push_back(&parameter);
  return parameters;
}

at::Tensor Model::loss(const Batch& batch, UnitRunner& runner) {
  const Unit& root = units_.front();
  const at::Tensor& embed_VD = root.parameters[0]->value;
  const at::Tensor positions_T = at::arange(batch.ids_T.numel(), at::kLong);
  at::Tensor x_TD = at::embedding(embed_VD, batch.ids_T) + at::embedding(root.parameters[1]->value, positions_T);
  // Every tensor goes into a block once: gradients meeting inside and outside of a unit would be added in another order
  // than without units.
  at::Tensor skip_TD = x_TD * 0.75;
  for (std::size_t i = 1; i < units_.size(); ++i) {
    Unit& block = units_[i];
    if (!use_last_block && i + 1 == units_.size()) break;
    const auto context = runner.recompute_context(block);
    const auto forward = [this, &block, context](const UnitRunner::Tensors& in) -> UnitRunner::Tensors {
      if (in_block) in_block(block);
      const auto value = [&](std::size_t k) -> const at::Tensor& { return block.parameters[k]->value; };
      const at::Tensor normed = at::layer_norm(in[0], {kWidth}, value(0), value(1));
      const at::Tensor mixed = attend(normed, context).view({-1, kWidth});
      const at::Tensor inner = at::gelu(at::linear(mixed, value(2), value(3)));
      return {in[0] + at::linear(inner, value(4)), in[1] * 0.5 + in[0], in[2], at::Tensor()};
    };
    const UnitRunner::Tensors out = runner.run(block, {x_TD, skip_TD, batch.ids_T, at::Tensor()}, forward);
    if (ignored_blocks.contains(static_cast<int>(i) - 1)) continue;
    x_TD = out[0];
    skip_TD = i % 2 == 0 ? x_TD * 0.75 : out[1];  // every other block has an output that nothing uses
  }
  x_TD = at::layer_norm(x_TD + skip_TD, {kWidth}, root.parameters[2]->value);
  const at::Tensor logits_TV = at::linear(x_TD, embed_VD).to(at::kFloat);
  return at::cross_entropy_loss(logits_TV, batch.labels_T, {}, at::Reduction::Sum);
}

std::int64_t storage_bytes(const Unit& unit) {
  std::int64_t bytes = 0;
  for (const Parameter* p : unit.parameters) bytes += static_cast<std::int64_t>(p->value.storage().nbytes());
  return bytes;
}

std::int64_t full_bytes(const Unit& unit) {
  std::int64_t bytes = 0;
  for (const Parameter* p : unit.parameters) bytes += p->numel() * static_cast<std::int64_t>(p->value.element_size());
  return bytes;
}

at::Tensor initial_weight(const Parameter& parameter) {
  PhiloxStream random(hash_bytes(parameter.name));
  at::Tensor weight = at::empty(parameter.shape, at::kFloat);
  const double center = parameter.is_norm && parameter.name.ends_with("weight") ? 1.0 : 0.0;
  for (std::int64_t i = 0; i < weight.numel(); ++i) {
    weight.mutable_data_ptr<float>()[i] = static_cast<float>(center + 0.2 * random.next_normal());
  }
  return weight;
}

void set_plain_values(Model& model, const Tensors& weights, at::ScalarType dtype) {
  for (Parameter* p : model.parameters()) {
    p->value = weights.at(p->name).to(dtype, /*non_blocking=*/false, /*copy=*/true);
    p->value.set_requires_grad(p->is_trainable);
    if (p->is_trainable) p->value.set_grad_dtype(at::kFloat);
  }
}

Tensors reference_gradients(Frozen frozen, at::ScalarType dtype, std::int64_t num_micro_batches) {
  Model model(frozen);
  Tensors weights;
  for (Parameter* p : model.parameters()) weights[p->name] = initial_weight(*p);
  set_plain_values(model, weights, dtype);
  std::vector<Tensors> leaves;
  for (std::int64_t i = 0; i < num_micro_batches; ++i) leaves.push_back(micro_batch_gradients(model, i));
  std::size_t width = 1;
  while (width < leaves.size()) width *= 2;
  return tree_sum(leaves, 0, width);
}

}  // namespace shardtune::toy
