#pragma once
// What a model is made of, as the parallel engine sees it: parameters grouped into units. Single-device code.
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

namespace shardtune {

class RecomputeContext;

// How Hugging Face initialises a parameter that no file provides.
struct InitRule {
  enum class Kind { zeros, ones, normal } kind = Kind::zeros;
  double deviation = 0.02;       // for normal
  std::int64_t zero_row = -1;    // a row set to zero afterwards (padding_idx of an embedding), -1 = none
};

// One weight tensor under its Hugging Face name, shape and layout.
struct Parameter {
  std::string name;                 // e.g. "bert.encoder.layer.0.output.dense.weight"
  std::vector<std::int64_t> shape;
  InitRule init;
  bool is_norm = false;             // weight or bias of a normalisation layer: no weight decay
  bool is_trainable = true;
  // The tensor the forward pass computes with: an autograd leaf in the compute dtype. Set by the parallel engine (or by
  // materialize() below); its storage may be empty except while its unit runs.
  at::Tensor value;

  std::int64_t numel() const;
};

// The grain of gathering, reducing and recomputing: a transformer layer, or the root (embeddings, final norm, head and
// everything tied). Parameters are owned by the model; a parameter is in exactly one unit.
struct Unit {
  std::string name;                 // "root", "layer.0", ...
  std::vector<Parameter*> parameters;
  bool is_root = false;             // root is gathered for the whole step; its computation runs in the outer graph
};

// Replaces module hooks. The model calls run() once per non-root unit, in execution order; everything outside of run()
// may use only root parameters. `forward` must be a pure function of its inputs and the unit's parameters (it may be
// executed again for recomputation). Outputs are in the order forward returns them.
class UnitRunner {
 public:
  using Tensors = std::vector<at::Tensor>;
  using Forward = std::function<Tensors(const Tensors& inputs)>;

  virtual ~UnitRunner() = default;
  virtual Tensors run(Unit& unit, const Tensors& inputs, const Forward& forward) = 0;
  // For the kernels of the next run of `unit`, captured by its forward; null where nothing is to be kept for them.
  virtual std::shared_ptr<RecomputeContext> recompute_context(const Unit& /*unit*/) { return nullptr; }
};

// Gives every parameter of the unit a value of its own: a leaf in `dtype` with the Hugging Face initialisation for `seed`.
// For one device, tests and goldens; the parallel engine sets values itself.
void materialize(Unit& unit, at::ScalarType dtype, std::uint64_t seed);

// Calls forward directly: for one device, tests and goldens.
class PlainRunner : public UnitRunner {
 public:
  Tensors run(Unit& unit, const Tensors& inputs, const Forward& forward) override;
};

}  // namespace shardtune
