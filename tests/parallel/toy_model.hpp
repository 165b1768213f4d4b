#pragma once
// A small residual network with everything that makes sharding hard: an embedding tied with the head, frozen tables,
// blocks with several inputs and outputs (one of them an integer tensor, one undefined), sizes that do not divide.
// Legend: T tokens, D width, F inner width, V vocabulary.
#include <cstdint>
#include <deque>
#include <map>
#include <set>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>

#include "models/unit.hpp"

namespace shardtune::toy {

enum class Frozen { nothing, positions, embeddings, all_but_one_block };

struct Batch {
  at::Tensor ids_T;
  at::Tensor labels_T;
};
// The same for every caller: a pure function of (step, micro-batch).
Batch make_batch(std::int64_t step, std::int64_t micro_batch);

class Model {
 public:
  explicit Model(Frozen frozen, int num_blocks = 3);
  Model(const Model&) = delete;
  std::vector<Unit*> units();
  std::vector<Parameter*> parameters();
  // Sum of the cross-entropy, fp32 scalar.
  at::Tensor loss(const Batch& batch, UnitRunner& runner);
  // Called inside every block's forward, with the block's unit.
  std::function<void(const Unit&)> in_block;
  bool use_last_block = true;
  std::set<int> ignored_blocks;  // they run, but the loss does not depend on them

 private:
  Parameter* add(Unit& unit, const std::string& name, std::vector<std::int64_t> shape, bool is_trainable);
  std::deque<Parameter> parameters_;
  std::deque<Unit> units_;
};

// Bytes that a unit's compute copies hold now, and that they hold while the unit is gathered.
std::int64_t storage_bytes(const Unit& unit);
std::int64_t full_bytes(const Unit& unit);

using Tensors = std::map<std::string, at::Tensor>;

// fp32 initial weights by name.
at::Tensor initial_weight(const Parameter& parameter);
// Gives the parameters plain leaves in `dtype` made of fp32 `weights`, as the engine does.
void set_plain_values(Model& model, const Tensors& weights, at::ScalarType dtype);
// The gradients of a step of `num_micro_batches`, computed without the engine and summed by a recursive canonical tree.
Tensors reference_gradients(Frozen frozen, at::ScalarType dtype, std::int64_t num_micro_batches);

}  // namespace shardtune::toy
