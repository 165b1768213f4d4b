#pragma once
// Private to kernels/: bf16 matrix products of any size with fp32 sums on the blocks of bf16_tiles.hpp. The terms of an
// element are added in an order that depends on K alone, so its bits depend neither on the number of threads nor on
// what other rows and columns there are. Only where instruction_set() has bf16 products; denormal numbers count as
// zero.
#include <cstdint>
#include <utility>

#include <ATen/core/Tensor.h>

#include "kernels/activation.hpp"

namespace shardtune {

// Whether a tensor is bf16 and instruction_set() has bf16 products.
bool takes_bf16_products(const at::Tensor& x);

// left [M, K] and right [K, N] bf16, either dimension of each may be the dense one (x, x.t()) -> [M, N] bf16; `right`
// in parts along `dim`, of the same dense dimension; all but the last are multiples of 32 long. The bits are those of
// the whole. bias [N] bf16, dense, or undefined: added before the one rounding.
at::Tensor bf16_gemm(const at::Tensor& left, at::TensorList right_parts, std::int64_t dim, const at::Tensor& bias = {});
// [M, N] without bias, rows padded to a multiple of 32 numbers: its rows are not next to each other in memory unless N
// is one. For a large result with an odd N, whose stores would otherwise cross cache lines.
at::Tensor bf16_gemm_aligned(const at::Tensor& left, const at::Tensor& right);
// The same as the first, and gelu_tanh of it while its blocks are in the first-level cache: {product, activated}.
std::pair<at::Tensor, at::Tensor> bf16_gemm_activated(const at::Tensor& left, const at::Tensor& right,
                                                      const at::Tensor& bias, Activation activation);
// The numbers of bf16_gemm(left, right), without bias, as fp32; for results that are not read soon.
at::Tensor bf16_gemm_widened(const at::Tensor& left, const at::Tensor& right);
// into [M, N] += left right, fp32 with dense rows: no sum is rounded to bf16.
void bf16_gemm_add(const at::Tensor& left, const at::Tensor& right, at::Tensor& into);

// [T, N] bf16 with dense rows -> [N] bf16, sums over rows in fp32, the same bits for any number of threads.
at::Tensor bf16_column_sums(const at::Tensor& x);

}  // namespace shardtune
