#include "distributed/parallel/sharded_runner.hpp"

#include <algorithm>
#include <exception>
#include <memory>
#include <utility>

#include <ATen/core/grad_mode.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/autograd.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

using Tensors = UnitRunner::Tensors;

bool is_differentiable(const at::Tensor& tensor) { return tensor.defined() && tensor.is_floating_point(); }

Tensors detach_all(const Tensors& tensors, bool keep_requires_grad) {
  Tensors detached;
  detached.reserve(tensors.size());
  for (const at::Tensor& tensor : tensors) {
    detached.push_back(tensor.defined() ? tensor.detach() : tensor);
    if (keep_requires_grad && tensor.defined() && tensor.requires_grad()) detached.back().set_requires_grad(true);
  }
  return detached;
}

torch::autograd::edge_list edges_of(const Tensors& inputs) {
  torch::autograd::edge_list edges;
  for (const at::Tensor& input : inputs) {
    const bool has_edge = input.defined() && input.requires_grad();
    edges.push_back(has_edge ? torch::autograd::impl::gradient_edge(input) : torch::autograd::Edge());
  }
  return edges;
}

// Keeps a unit unsharded for a scope; on the way out, also when its forward throws, it is resharded where asked.
class UnshardedScope {
 public:
  UnshardedScope(ShardUnit& unit, bool reshard) : unit_(unit), reshard_(reshard) { unit_.unshard(); }
  ~UnshardedScope() {
    if (reshard_ || std::uncaught_exceptions() > num_exceptions_) unit_.reshard();
  }
  UnshardedScope(const UnshardedScope&) = delete;
  UnshardedScope& operator=(const UnshardedScope&) = delete;

 private:
  ShardUnit& unit_;
  bool reshard_;
  int num_exceptions_ = std::uncaught_exceptions();
};

}  // namespace

class ShardedRunner::UnitBackward : public torch::autograd::Node {
 public:
  UnitBackward(ShardedRunner& runner, std::size_t index)
      : runner_(runner), index_(index), unit_(*runner.entries_[index].unit) {}

  // inputs: detached leaves. Exactly one of outputs (inner graph) and forward (to recompute it) is kept.
  void keep(Tensors inputs, Tensors outputs, Forward forward) {
    inputs_ = std::move(inputs);
    outputs_ = std::move(outputs);
    forward_ = std::move(forward);
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    check_internal(outputs_.empty() != !forward_, "UnitBackward: backward ran twice through one graph");
    {
      const UnshardedScope unsharded(unit_, true);
      runner_.prefetch_previous(index_);
      if (forward_) {
        const at::AutoGradMode grad_mode(true);
        outputs_ = forward_(inputs_);
      }
      Tensors roots;
      Tensors root_gradients;
      for (std::size_t i = 0; i < gradients.size(); ++i) {
        if (!gradients[i].defined() || !outputs_[i].defined() || !outputs_[i].requires_grad()) continue;
        roots.push_back(outputs_[i]);
        root_gradients.push_back(gradients[i]);
      }
      outputs_.clear();
      gradients.clear();
      if (!roots.empty()) torch::autograd::backward(roots, root_gradients);
    }
    torch::autograd::variable_list input_gradients;
    for (const at::Tensor& input : inputs_) {
      input_gradients.push_back(input.defined() && input.requires_grad() ? input.grad() : at::Tensor());
    }
    release_variables();
    if (unit_.has_trainable()) runner_.on_complete_(unit_);
    return input_gradients;
  }

  void release_variables() override {
    inputs_.clear();
    outputs_.clear();
    forward_ = nullptr;
  }

  std::string name() const override { return "UnitBackward(" + unit_.unit().name + ")"; }

 private:
  ShardedRunner& runner_;
  std::size_t index_;
  ShardUnit& unit_;
  Tensors inputs_;
  Tensors outputs_;
  Forward forward_;
};

ShardedRunner::ShardedRunner(Options options, OnComplete on_complete)
    : options_(options), on_complete_(std::move(on_complete)) {}

void ShardedRunner::add_unit(ShardUnit& unit) {
  index_of_.emplace(&unit.unit(), entries_.size());
  entries_.push_back({.unit = &unit});
}

void ShardedRunner::begin_micro_batch() {
  for (Entry& entry : entries_) entry.has_node = false;
}

void ShardedRunner::prefetch_first() {
  if (!entries_.empty()) entries_.front().unit->begin_unshard();
}

void ShardedRunner::prefetch_next(std::size_t index) {
  if (index + 1 < entries_.size()) entries_[index + 1].unit->begin_unshard();
}

void ShardedRunner::prefetch_previous(std::size_t index) {
  if (index > 0 && entries_[index - 1].has_node) entries_[index - 1].unit->begin_unshard();
}

Tensors ShardedRunner::run(Unit& unit, const Tensors& inputs, const Forward& forward) {
  const auto found = index_of_.find(&unit);
  if (found == index_of_.end()) {
    fail(ErrorKind::internal, fmt::format("unit '{}' is not run by the engine (root units never are)", unit.name));
  }
  const std::size_t index = found->second;
  Entry& entry = entries_[index];
  const bool needs_graph =
      at::GradMode::is_enabled() &&
      (entry.unit->has_trainable() || std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor& tensor) {
         return tensor.defined() && tensor.requires_grad();
       }));
  if (!needs_graph) {
    const at::NoGradGuard no_grad;
    const UnshardedScope unsharded(*entry.unit, true);
    prefetch_next(index);
    return forward(inputs);
  }
  if (std::exchange(entry.has_node, true)) {
    fail(ErrorKind::internal, fmt::format("unit '{}' ran twice in one micro-batch", unit.name));
  }
  std::shared_ptr<UnitBackward> node(new UnitBackward(*this, index), torch::autograd::deleteNode);
  node->set_next_edges(edges_of(inputs));
  Tensors inner_inputs = detach_all(inputs, true);
  Tensors inner_outputs;
  {
    const UnshardedScope unsharded(*entry.unit, options_.reshard_after_forward);
    prefetch_next(index);
    const at::AutoGradMode grad_mode(!options_.recompute);
    inner_outputs = forward(inner_inputs);
  }
  // The last unit's weights are wanted again as soon as the loss is known.
  if (index + 1 == entries_.size()) entry.unit->begin_unshard();
  Tensors outputs = detach_all(inner_outputs, false);
  for (at::Tensor& output : outputs) {
    // Each output takes one number of the node, also those without a gradient: apply() counts on equal positions.
    torch::autograd::set_history(is_differentiable(output) ? output : at::Tensor(), node);
  }
  node->keep(std::move(inner_inputs), options_.recompute ? Tensors() : std::move(inner_outputs),
             options_.recompute ? forward : Forward());
  return outputs;
}

}  // namespace shardtune
