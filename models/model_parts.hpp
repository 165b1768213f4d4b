#pragma once
// What every architecture is put together from: parameters with stable addresses, units, and the layers that need both.
#include <cstdint>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "core/batch.hpp"
#include "kernels/activation.hpp"
#include "kernels/embedding.hpp"
#include "kernels/linear.hpp"
#include "kernels/norm.hpp"
#include "models/model.hpp"
#include "models/unit.hpp"

namespace shardtune {

struct LinearParameters {
  Parameter* weight = nullptr;                       // [out, in]
  Parameter* bias = nullptr;                         // [out] or absent
  at::Tensor operator()(const at::Tensor& x) const;  // [T, in] -> [T, out]
  at::Tensor activated(const at::Tensor& x, Activation activation) const;
  LinearOperands operands() const;  // for apply_linears()
};

struct LayerNormParameters {
  Parameter* weight = nullptr;
  Parameter* bias = nullptr;
  double eps = 1e-12;
  at::Tensor operator()(const at::Tensor& x) const;
  NormedSum operator()(const ResidualAdd& add) const;
};

// Owns parameters and units. Not copyable: units hold addresses.
class ModelParts {
 public:
  // deviation: HF's initializer_range, the deviation of every weight matrix.
  explicit ModelParts(double deviation) : deviation_(deviation) {}
  ModelParts(const ModelParts&) = delete;
  ModelParts& operator=(const ModelParts&) = delete;

  Unit& add_unit(const std::string& name, bool is_root = false);
  Parameter* add_weight(Unit& unit, const std::string& name, std::vector<std::int64_t> shape);
  // Sizes {out, in}.
  LinearParameters add_linear(Unit& unit, const std::string& name, std::vector<std::int64_t> sizes, bool has_bias);
  // padding_row is initialised to zero; -1 = none.
  Parameter* add_embedding(Unit& unit, const std::string& name, std::vector<std::int64_t> sizes,
                           std::int64_t padding_row = -1);
  LayerNormParameters add_layer_norm(Unit& unit, const std::string& name, std::int64_t size, double eps);
  Parameter* add_rms_norm(Unit& unit, const std::string& name, std::int64_t size);

  std::vector<Unit*> units();

 private:
  Parameter* add(Unit& unit, Parameter parameter);

  double deviation_;
  std::deque<Parameter> parameters_;
  std::deque<Unit> units_;
};

// The number of a place of dropout in a layer, fixed for ever: masks are keyed by it. 0 to 15 are outside of the layers.
constexpr std::int64_t layer_site(std::int64_t layer, std::int64_t place) { return 16 * (layer + 1) + place; }

// The head of a causal language model over hidden states [T, D]; head: [V, D]. `tied`: as the embedding got it, or null.
ModelOutput run_causal_lm_head(const at::Tensor& hidden, const at::Tensor& head, const Batch& batch,
                               const ForwardOptions& options, const std::shared_ptr<TiedGradient>& tied);

// The offsets of a batch in the form that attention keeps for recomputation.
std::shared_ptr<const std::vector<std::int64_t>> shared_offsets(const Batch& batch);
// Error{data} when a segment is longer than the model's positions; internal error for an ill-formed batch.
void check_batch(const Batch& batch, std::int64_t max_positions);
// [S] int64: where each segment starts.
at::Tensor segment_starts(const Batch& batch);

}  // namespace shardtune
