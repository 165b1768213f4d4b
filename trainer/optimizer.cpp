#include "trainer/optimizer.hpp"

#include <algorithm>
#include <charconv>
#include <map>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <fmt/ranges.h>

#include "core/error.hpp"
#include "core/hash.hpp"
#include "kernels/adamw.hpp"
#include "kernels/sgd.hpp"

namespace shardtune {
namespace {

struct Update {
  double learning_rate;
  double gradient_scale;
  std::int64_t step;
};
using Arguments = std::map<std::string, std::string>;  // of --optim_args

struct OptimizerRow {
  std::string_view name;  // of --optim
  std::string_view family;
  void (*read_arguments)(const Arguments& arguments, OptimizerSettings& settings);
  std::vector<std::string> (*state_names)(const OptimizerSettings& settings);
  void (*update)(const Optimizer::State& state, const OptimizerSettings& settings, const Update& update);
};

[[noreturn]] void refuse_argument(const std::string& name, const std::string& value, const std::string& advice) {
  fail(ErrorKind::config, fmt::format("--optim_args: {} = {}: {}", name, value, advice));
}

void read_adamw_arguments(const Arguments& arguments, OptimizerSettings& settings) {
  for (const auto& [name, value] : arguments)
    refuse_argument(name, value, settings.name + " takes no arguments here; use --adam_beta1, --adam_beta2, --adam_epsilon, --weight_decay");
}

std::vector<std::string> adamw_state_names(const OptimizerSettings& /*settings*/) { return {"exp_avg", "exp_avg_sq"}; }

void adamw_update(const Optimizer::State& state, const OptimizerSettings& settings, const Update& update) {
  adamw_step({.param = state.parameter->master,
              .exp_avg = state.tensors[0],
              .exp_avg_sq = state.tensors[1],
              .grad = state.parameter->gradient,
              .offset = state.parameter->master_offset,
              .rounded = state.parameter->compute_copy},
             {.lr = update.learning_rate,
              .beta1 = settings.beta1,
              .beta2 = settings.beta2,
              .eps = settings.epsilon,
              .weight_decay = state.decays ? settings.weight_decay : 0.0,
              .step = update.step,
              .rounding_key = hash_bytes(state.parameter->parameter->name),
              .grad_scale = update.gradient_scale});
}

double number_of(const std::string& name, const std::string& value) {
  double number = 0.0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), number);
  if (error != std::errc() || end != value.data() + value.size()) refuse_argument(name, value, "a number is needed");
  return number;
}

void read_sgd_arguments(const Arguments& arguments, OptimizerSettings& settings) {
  for (const auto& [name, value] : arguments) {
    if (name == "momentum") {
      settings.momentum = number_of(name, value);
      if (!(settings.momentum >= 0.0 && settings.momentum < 1.0)) refuse_argument(name, value, "0 to below 1 is needed");
    } else if (name == "nesterov") {
      std::string lowered = value;
      std::transform(lowered.begin(), lowered.end(), lowered.begin(), [](unsigned char c) { return std::tolower(c); });
      settings.nesterov = lowered == "true" || lowered == "1" || lowered == "yes";
      if (!settings.nesterov && lowered != "false" && lowered != "0" && lowered != "no") refuse_argument(name, value, "use true or false");
    } else if (name == "dampening") {
      if (number_of(name, value) != 0.0) refuse_argument(name, value, "only 0 is supported; leave it out");
    } else if (name == "weight_decay") {
      refuse_argument(name, value, "use --weight_decay, which decides for the parameters that decay");
    } else {
      refuse_argument(name, value, "sgd takes momentum and nesterov");
    }
  }
  if (settings.nesterov && settings.momentum == 0.0) refuse_argument("nesterov", "true", "it needs momentum above 0");
}

std::vector<std::string> sgd_state_names(const OptimizerSettings& settings) {
  if (settings.momentum == 0.0) return {};
  return {"momentum_buffer"};
}

void sgd_update(const Optimizer::State& state, const OptimizerSettings& settings, const Update& update) {
  sgd_step({.param = state.parameter->master,
            .momentum_buffer = state.tensors.empty() ? at::Tensor() : state.tensors.front(),
            .grad = state.parameter->gradient,
            .rounded = state.parameter->compute_copy},
           {.lr = update.learning_rate,
            .momentum = settings.momentum,
            .weight_decay = state.decays ? settings.weight_decay : 0.0,
            .nesterov = settings.nesterov,
            .grad_scale = update.gradient_scale});
}

constexpr OptimizerRow kRows[] = {
    {"adamw_torch", "adamw", read_adamw_arguments, adamw_state_names, adamw_update},
    {"adamw_torch_fused", "adamw", read_adamw_arguments, adamw_state_names, adamw_update},
    {"sgd", "sgd", read_sgd_arguments, sgd_state_names, sgd_update},
};

const OptimizerRow& find_row(const std::string& name) {
  std::vector<std::string_view> names;
  for (const OptimizerRow& row : kRows) {
    if (row.name == name) return row;
    names.push_back(row.name);
  }
  fail(ErrorKind::config, fmt::format("--optim = {}: use {}", name, fmt::join(names, ", ")));
}

// Hugging Face's spelling: "momentum=0.9, nesterov=true".
Arguments split_arguments(std::string text) {
  std::erase(text, ' ');
  Arguments arguments;
  for (std::size_t begin = 0; begin < text.size();) {
    const std::size_t end = std::min(text.find(',', begin), text.size());
    const std::string word = text.substr(begin, end - begin);
    const std::size_t equals = word.find('=');
    if (equals == std::string::npos || equals == 0)
      fail(ErrorKind::config, fmt::format("--optim_args = {}: '{}' is no NAME=VALUE; write for example momentum=0.9,nesterov=true", text, word));
    if (!arguments.emplace(word.substr(0, equals), word.substr(equals + 1)).second)
      fail(ErrorKind::config, fmt::format("--optim_args = {}: {} is given twice; give it once", text, word.substr(0, equals)));
    begin = end + 1;
  }
  return arguments;
}

}  // namespace

OptimizerSettings optimizer_settings(const TrainOptions& train) {
  OptimizerSettings settings{.name = train.optim,
                             .weight_decay = train.weight_decay,
                             .beta1 = train.adam_beta1,
                             .beta2 = train.adam_beta2,
                             .epsilon = train.adam_epsilon,
                             .state_dtype = train.adam_state_dtype == "bf16" ? at::kBFloat16 : at::kFloat};
  const OptimizerRow& row = find_row(train.optim);
  row.read_arguments(split_arguments(train.optim_args), settings);
  if (row.family != "adamw" && settings.state_dtype != at::kFloat)
    fail(ErrorKind::config, fmt::format("--adam_state_dtype = {}: the state of --optim {} is fp32; leave the option out", train.adam_state_dtype, train.optim));
  return settings;
}

std::string optimizer_family(const OptimizerSettings& settings) {
  const std::string family(find_row(settings.name).family);
  return settings.momentum == 0.0 ? family : family + " with momentum";
}

Optimizer::Optimizer(ParallelEngine& engine, const OptimizerSettings& settings)
    : settings_(settings), state_names_(find_row(settings.name).state_names(settings)) {
  for (ShardedParameter* p : engine.trainable()) {
    states_.push_back({.parameter = p, .tensors = {}, .decays = has_weight_decay(*p->parameter)});
    for (std::size_t i = 0; i < state_names_.size(); ++i)
      states_.back().tensors.push_back(at::zeros({p->master.numel()}, settings.state_dtype));
  }
}

void Optimizer::step(double learning_rate, double gradient_scale, std::int64_t step) {
  const OptimizerRow& row = find_row(settings_.name);
  for (const State& state : states_) {
    if (before_update_) before_update_(state);
    row.update(state, settings_, {.learning_rate = learning_rate, .gradient_scale = gradient_scale, .step = step});
  }
}

std::int64_t Optimizer::state_bytes() const {
  std::int64_t bytes = 0;
  for (const State& state : states_)
    for (const at::Tensor& tensor : state.tensors) bytes += static_cast<std::int64_t>(tensor.nbytes());
  return bytes;
}

}  // namespace shardtune
