#include "models/model_parts.hpp"

#include <utility>

#include <ATen/ATen.h>
#include <fmt/format.h>

#include "core/error.hpp"
#include "kernels/cross_entropy.hpp"

namespace shardtune {

LinearOperands LinearParameters::operands() const {
  return {weight->value, bias == nullptr ? at::Tensor() : bias->value};
}

at::Tensor LinearParameters::operator()(const at::Tensor& x) const { return apply_linears(x, {operands()}); }

at::Tensor LinearParameters::activated(const at::Tensor& x, Activation activation) const {
  return apply_activated_linear(x, operands(), activation);
}

at::Tensor LayerNormParameters::operator()(const at::Tensor& x) const {
  return layer_norm(x, weight->value, bias->value, eps);
}

NormedSum LayerNormParameters::operator()(const ResidualAdd& add) const {
  return add_layer_norm(add, weight->value, bias->value, eps);
}

Unit& ModelParts::add_unit(const std::string& name, bool is_root) {
  return units_.emplace_back(Unit{.name = name, .parameters = {}, .is_root = is_root});
}

Parameter* ModelParts::add(Unit& unit, Parameter parameter) {
  Parameter* added = &parameters_.emplace_back(std::move(parameter));
  unit.parameters.push_back(added);
  return added;
}

Parameter* ModelParts::add_weight(Unit& unit, const std::string& name, std::vector<std::int64_t> shape) {
  return add(unit, {.name = name,
                    .shape = std::move(shape),
                    .init = {.kind = InitRule::Kind::normal, .deviation = deviation_},
                    .value = {}});
}

LinearParameters ModelParts::add_linear(Unit& unit, const std::string& name, std::vector<std::int64_t> sizes,
                                        bool has_bias) {
  const std::int64_t out = sizes.at(0);
  LinearParameters linear_parameters{.weight = add_weight(unit, name + ".weight", std::move(sizes))};
  if (has_bias) linear_parameters.bias = add(unit, {.name = name + ".bias", .shape = {out}, .init = {}, .value = {}});
  return linear_parameters;
}

Parameter* ModelParts::add_embedding(Unit& unit, const std::string& name, std::vector<std::int64_t> sizes,
                                     std::int64_t padding_row) {
  Parameter* table = add_weight(unit, name + ".weight", std::move(sizes));
  table->init.zero_row = padding_row;
  return table;
}

LayerNormParameters ModelParts::add_layer_norm(Unit& unit, const std::string& name, std::int64_t size, double eps) {
  Parameter* weight = add_rms_norm(unit, name, size);
  Parameter* bias = add(unit, {.name = name + ".bias", .shape = {size}, .init = {}, .is_norm = true, .value = {}});
  return {.weight = weight, .bias = bias, .eps = eps};
}

Parameter* ModelParts::add_rms_norm(Unit& unit, const std::string& name, std::int64_t size) {
  return add(unit, {.name = name + ".weight",
                    .shape = {size},
                    .init = {.kind = InitRule::Kind::ones},
                    .is_norm = true,
                    .value = {}});
}

std::vector<Unit*> ModelParts::units() {
  std::vector<Unit*> all;
  for (Unit& unit : units_) all.push_back(&unit);
  return all;
}

ModelOutput run_causal_lm_head(const at::Tensor& hidden, const at::Tensor& head, const Batch& batch,
                               const ForwardOptions& options, const std::shared_ptr<TiedGradient>& tied) {
  ModelOutput output;
  if (options.want_logits) output.logits = apply_linear(hidden, head).to(at::kFloat);
  if (batch.labels.defined())
    output.loss_sum = linear_cross_entropy_sum(
        hidden, head, batch.labels,
        {.loss_scale = options.loss_scale, .label_smoothing = options.label_smoothing, .tied = tied});
  return output;
}

std::shared_ptr<const std::vector<std::int64_t>> shared_offsets(const Batch& batch) {
  return std::make_shared<const std::vector<std::int64_t>>(batch.segment_offsets);
}

void check_batch(const Batch& batch, std::int64_t max_positions) {
  const auto& offsets = batch.segment_offsets;
  check_internal(offsets.size() >= 2 && offsets.front() == 0 && offsets.back() == batch.ids.numel() &&
                     batch.positions.numel() == batch.ids.numel(),
                 "a batch needs at least one segment, and offsets and positions that fit its ids");
  for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
    const std::int64_t length = offsets[s + 1] - offsets[s];
    check_internal(length > 0, "a batch must not hold empty segments");
    if (length > max_positions)
      fail(ErrorKind::data,
           fmt::format("example {} has {} tokens, the model takes {} at most; set max_seq_length to {}",
                       s < batch.example_index.size() ? batch.example_index[s] : std::int64_t(s), length, max_positions,
                       max_positions));
  }
}

at::Tensor segment_starts(const Batch& batch) {
  at::Tensor starts = at::empty({batch.num_segments()}, at::kLong);
  std::copy_n(batch.segment_offsets.begin(), batch.num_segments(), starts.mutable_data_ptr<std::int64_t>());
  return starts;
}

}  // namespace shardtune
