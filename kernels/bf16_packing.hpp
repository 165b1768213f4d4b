#pragma once
// Private to kernels/: bf16 blocks for packed_gemm.hpp, in the layout that bf16_tiles.hpp multiplies.
#include <cstdint>

#include <ATen/core/Tensor.h>

#include "kernels/bf16_tiles.hpp"
#include "kernels/gemm_blocking.hpp"

namespace shardtune::bf16 {

// The bits of a bf16 tensor.
inline const std::uint16_t* numbers(const at::Tensor& x) { return packed::numbers<std::uint16_t>(x); }

// A Unit of packed_gemm.hpp. A panel is pairs [depth / 2, 32]: words of Product::b.
struct Unit {
  using Number = std::uint16_t;
  using Session = TileSession;
  static constexpr at::ScalarType kDtype = at::kBFloat16;

  static packed::Limits limits();
  static void pack_left(const at::Tensor& left, const packed::Blocking& b, packed::Range rows, std::int64_t first,
                        Number* into);
  static void pack_right(const packed::RightSide& right, const packed::Blocking& b, packed::Range columns,
                         std::int64_t first, Number* into);
  static void multiply(const packed::BlockTerms<Number>& terms);
};

}  // namespace shardtune::bf16
