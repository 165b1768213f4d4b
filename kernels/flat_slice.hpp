#pragma once
// Private to kernels/: what the optimizers work on, flat slices of parameters and of their state.
#include <cstdint>

#include <ATen/core/Tensor.h>
#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include "core/error.hpp"
#include "kernels/simd_memory.hpp"

namespace shardtune {

// The memory of a 1-d contiguous CPU tensor of `numel` elements of `dtype`; Error{internal} with `requirement` for
// others.
inline void* flat_data(const at::Tensor& tensor, std::int64_t numel, at::ScalarType dtype, const char* requirement) {
  check_internal(tensor.defined() && tensor.scalar_type() == dtype && tensor.is_contiguous() && tensor.dim() == 1 &&
                     tensor.numel() == numel && tensor.is_cpu(),
                 requirement);
  return tensor.data_ptr();
}

// The 16-bit copy of a parameter that an optimizer writes in its pass over the parameter, or none.
class RoundedCopy {
 public:
  // A block of all the streams of an optimizer fits into the nearest caches: after an update the copy finds its block
  // there.
  static constexpr std::int64_t kBlock = 2048;

  // bf16 or fp16, as flat_data wants it; undefined: none.
  RoundedCopy(const at::Tensor& copy, std::int64_t numel, const char* requirement) {
    if (!copy.defined()) return;
    dtype_ = copy.scalar_type() == at::kHalf ? at::kHalf : at::kBFloat16;
    data_ = flat_data(copy, numel, dtype_, requirement);
  }

  // update(b, e) for the blocks of [begin, end), each followed by the rounding of param[b, e). In a
  // SHARDTUNE_VECTOR_BODY.
  template <class Update>
  SHARDTUNE_INLINE void run(const float* param, std::int64_t begin, std::int64_t end, const Update& update) const {
    if (data_ == nullptr) return update(begin, end);
    for (; begin < end; begin += kBlock) {
      const std::int64_t block_end = begin + kBlock < end ? begin + kBlock : end;
      update(begin, block_end);
      if (dtype_ == at::kHalf) {
        round(param, static_cast<c10::Half*>(data_), begin, block_end);
      } else {
        round(param, static_cast<c10::BFloat16*>(data_), begin, block_end);
      }
    }
  }

 private:
  template <class T>
  SHARDTUNE_INLINE static void round(const float* from, T* to, std::int64_t begin, std::int64_t end) {
    std::int64_t i = begin;
    for (; i + simd::kLanes <= end; i += simd::kLanes) simd::store(to + i, simd::load(from + i));
    if (i < end) simd::store_some(to + i, simd::load_some(from + i, end - i, 0.0F), end - i);
  }

  void* data_ = nullptr;
  at::ScalarType dtype_ = at::kBFloat16;
};

}  // namespace shardtune
