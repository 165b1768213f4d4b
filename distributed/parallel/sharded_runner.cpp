#include "distributed/parallel/sharded_runner.hpp"

#include <algorithm>
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

class UnitBackward : public torch::autograd::Node {
 public:
  UnitBackward(ShardUnit& unit, const ShardedRunner::OnComplete& on_complete)
      : unit_(unit), on_complete_(on_complete) {}

  // inputs: detached leaves. Exactly one of outputs (inner graph) and forward (to recompute it) is kept.
  void keep(Tensors inputs, Tensors outputs, UnitRunner::Forward forward) {
    inputs_ = std::move(inputs);
    outputs_ = std::move(outputs);
    forward_ = std::move(forward);
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    check_internal(outputs_.empty() != !forward_, "UnitBackward: backward ran twice through one graph");
    {
      const UnshardedScope unsharded(unit_);
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
    if (unit_.has_trainable()) on_complete_(unit_);
    return input_gradients;
  }

  void release_variables() override {
    inputs_.clear();
    outputs_.clear();
    forward_ = nullptr;
  }

  std::string name() const override { return "UnitBackward(" + unit_.unit().name + ")"; }

 private:
  ShardUnit& unit_;
  const ShardedRunner::OnComplete& on_complete_;
  Tensors inputs_;
  Tensors outputs_;
  UnitRunner::Forward forward_;
};

}  // namespace

ShardedRunner::ShardedRunner(bool recompute, OnComplete on_complete)
    : recompute_(recompute), on_complete_(std::move(on_complete)) {}

void ShardedRunner::add_unit(ShardUnit& unit) { units_.emplace(&unit.unit(), &unit); }

Tensors ShardedRunner::run(Unit& unit, const Tensors& inputs, const Forward& forward) {
  const auto found = units_.find(&unit);
  if (found == units_.end()) {
    fail(ErrorKind::internal, fmt::format("unit '{}' is not run by the engine (root units never are)", unit.name));
  }
  ShardUnit& sharded = *found->second;
  const bool needs_graph =
      at::GradMode::is_enabled() &&
      (sharded.has_trainable() || std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor& tensor) {
         return tensor.defined() && tensor.requires_grad();
       }));
  if (!needs_graph) {
    const at::NoGradGuard no_grad;
    const UnshardedScope unsharded(sharded);
    return forward(inputs);
  }
  if (!has_run_.insert(&unit).second) {
    fail(ErrorKind::internal, fmt::format("unit '{}' ran twice in one micro-batch", unit.name));
  }
  std::shared_ptr<UnitBackward> node(new UnitBackward(sharded, on_complete_), torch::autograd::deleteNode);
  node->set_next_edges(edges_of(inputs));
  Tensors inner_inputs = detach_all(inputs, true);
  Tensors inner_outputs;
  {
    const UnshardedScope unsharded(sharded);
    const at::AutoGradMode grad_mode(!recompute_);
    inner_outputs = forward(inner_inputs);
  }
  Tensors outputs = detach_all(inner_outputs, false);
  for (at::Tensor& output : outputs) {
    // Each output takes one number of the node, also those without a gradient: apply() counts on equal positions.
    torch::autograd::set_history(is_differentiable(output) ? output : at::Tensor(), node);
  }
  node->keep(std::move(inner_inputs), recompute_ ? Tensors() : std::move(inner_outputs),
             recompute_ ? forward : Forward());
  return outputs;
}

}  // namespace shardtune
