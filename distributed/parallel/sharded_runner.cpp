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
#include "core/memory.hpp"
#include "kernels/recompute_context.hpp"

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

std::int64_t bytes_of(const Tensors& tensors) {
  std::int64_t bytes = 0;
  for (const at::Tensor& tensor : tensors) bytes += tensor.defined() ? static_cast<std::int64_t>(tensor.nbytes()) : 0;
  return bytes;
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
  void keep_graph(Tensors inputs, Tensors outputs) {
    inputs_ = std::move(inputs);
    outputs_ = std::move(outputs);
  }
  void keep_forward(Tensors inputs, Forward forward, std::shared_ptr<RecomputeContext> context) {
    inputs_ = std::move(inputs);
    forward_ = std::move(forward);
    context_ = std::move(context);
  }

  torch::autograd::variable_list apply(torch::autograd::variable_list&& gradients) override {
    check_internal(outputs_.empty() != !forward_, "UnitBackward: backward ran twice through one graph");
    runner_.drop_other_gathers(index_);
    {
      const UnshardedScope unsharded(unit_, true);
      runner_.prefetch_previous(index_);
      if (forward_) recompute();
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
    context_.reset();
  }

  std::string name() const override { return "UnitBackward(" + unit_.unit().name + ")"; }

 private:
  void recompute() {
    const at::AutoGradMode grad_mode(true);
    RecomputePolicy& policy = runner_.policy_;
    const bool is_measured = policy.wants_measurement(index_);
    const std::int64_t kept = is_measured && context_ ? context_->num_bytes() : 0;
    const std::int64_t held_before = is_measured ? tensor_bytes() : 0;
    outputs_ = forward_(inputs_);
    if (is_measured) policy.measured(index_, bytes_of(inputs_), tensor_bytes() - held_before + kept, kept);
  }

  ShardedRunner& runner_;
  std::size_t index_;
  ShardUnit& unit_;
  Tensors inputs_;
  Tensors outputs_;
  Forward forward_;
  std::shared_ptr<RecomputeContext> context_;
};

ShardedRunner::ShardedRunner(Options options, OnComplete on_complete)
    : options_(options), policy_(options.recompute), on_complete_(std::move(on_complete)) {}

void ShardedRunner::add_unit(ShardUnit& unit) {
  index_of_.emplace(&unit.unit(), entries_.size());
  entries_.push_back({.unit = &unit});
}

void ShardedRunner::begin_micro_batch() {
  for (Entry& entry : entries_) entry.has_node = false;
  policy_.begin_micro_batch();
}

void ShardedRunner::prefetch_first() {
  if (!entries_.empty()) entries_.front().unit->begin_unshard();
}

void ShardedRunner::drop_other_gathers(std::size_t index) {
  if (!options_.reshard_after_forward) return;
  for (std::size_t i = 0; i < entries_.size(); ++i) {
    if (i != index) entries_[i].unit->drop_gather();
  }
}

void ShardedRunner::prefetch_next(std::size_t index) {
  if (index + 1 < entries_.size()) entries_[index + 1].unit->begin_unshard();
}

void ShardedRunner::prefetch_previous(std::size_t index) {
  if (index > 0 && entries_[index - 1].has_node) entries_[index - 1].unit->begin_unshard();
}

std::size_t ShardedRunner::index_of(const Unit& unit) const {
  const auto found = index_of_.find(&unit);
  if (found == index_of_.end()) {
    fail(ErrorKind::internal, fmt::format("unit '{}' is not run by the engine (root units never are)", unit.name));
  }
  return found->second;
}

std::shared_ptr<RecomputeContext> ShardedRunner::recompute_context(const Unit& unit) {
  Entry& entry = entries_[index_of(unit)];
  entry.context.reset();
  if (at::GradMode::is_enabled() && policy_.may_be_selective()) entry.context = std::make_shared<RecomputeContext>();
  return entry.context;
}

Tensors ShardedRunner::run(Unit& unit, const Tensors& inputs, const Forward& forward) {
  const std::size_t index = index_of(unit);
  Entry& entry = entries_[index];
  const bool needs_graph =
      at::GradMode::is_enabled() &&
      (entry.unit->has_trainable() || std::any_of(inputs.begin(), inputs.end(), [](const at::Tensor& tensor) {
         return tensor.defined() && tensor.requires_grad();
       }));
  if (!needs_graph) {
    if (entry.context) entry.context->set_enabled(false);
    const at::NoGradGuard no_grad;
    drop_other_gathers(index);
    const UnshardedScope unsharded(*entry.unit, true);
    prefetch_next(index);
    return forward(inputs);
  }
  if (std::exchange(entry.has_node, true)) {
    fail(ErrorKind::internal, fmt::format("unit '{}' ran twice in one micro-batch", unit.name));
  }
  std::shared_ptr<UnitBackward> node(new UnitBackward(*this, index), torch::autograd::deleteNode);
  node->set_next_edges(edges_of(inputs));
  Tensors outputs = run_forward(*node, index, inputs, forward);
  for (at::Tensor& output : outputs) {
    // Each output takes one number of the node, also those without a gradient: apply() counts on equal positions.
    torch::autograd::set_history(is_differentiable(output) ? output : at::Tensor(), node);
  }
  return outputs;
}

Tensors ShardedRunner::run_forward(UnitBackward& node, std::size_t index, const Tensors& inputs,
                                   const Forward& forward) {
  Entry& entry = entries_[index];
  Tensors inner_inputs = detach_all(inputs, true);
  Tensors inner_outputs;
  const RecomputeMode mode = policy_.choose(index, bytes_of(inputs));
  if (entry.context) entry.context->set_enabled(mode == RecomputeMode::selective);
  drop_other_gathers(index);
  {
    const UnshardedScope unsharded(*entry.unit, options_.reshard_after_forward);
    prefetch_next(index);
    const at::AutoGradMode grad_mode(mode == RecomputeMode::none);
    inner_outputs = forward(inner_inputs);
  }
  // The last unit's weights are wanted again as soon as the loss is known.
  if (index + 1 == entries_.size()) entry.unit->begin_unshard();
  Tensors outputs = detach_all(inner_outputs, false);
  if (mode == RecomputeMode::none) {
    node.keep_graph(std::move(inner_inputs), std::move(inner_outputs));
  } else {
    node.keep_forward(std::move(inner_inputs), forward, std::move(entry.context));
  }
  return outputs;
}

}  // namespace shardtune
