#pragma once
// What the optimizers' kernels work on: flat slices of parameters and of their state.
#include <cstdint>

#include <ATen/core/Tensor.h>

#include "core/error.hpp"

namespace shardtune {

// The memory of a 1-d contiguous CPU tensor of `numel` elements of `dtype`; Error{internal} with `requirement` for others.
inline void* flat_data(const at::Tensor& tensor, std::int64_t numel, at::ScalarType dtype, const char* requirement) {
  check_internal(tensor.defined() && tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.dim() == 1 &&
                     tensor.numel() == numel && tensor.is_cpu(),
                 requirement);
  return tensor.data_ptr();
}

}  // namespace shardtune
