#include "models/unit.hpp"

namespace shardtune {

std::int64_t Parameter::numel() const {
  std::int64_t product = 1;
  for (const std::int64_t dim : shape) product *= dim;
  return product;
}

UnitRunner::Tensors PlainRunner::run(Unit& /*unit*/, const Tensors& inputs, const Forward& forward) {
  return forward(inputs);
}

}  // namespace shardtune
