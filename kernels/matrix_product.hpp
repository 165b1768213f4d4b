#pragma once
// The matrix products of every operator, but for attention that has kernels of its own. Their bits do not depend on the
// number of threads: bf16 on a processor with bf16 products by bf16_gemm.hpp, fp32 where they are preferred by
// fp32_gemm.hpp, or by MKL where it is told to keep the order of its sums (its strict mode, which launcher/front.cpp
// asks for on Intel's processors). Everything else is cut into blocks by the size of the result alone, and ATen
// computes each on one thread; were it to share a product among threads, it would cut long sums (K of 1000 and more) by
// their number. Blocks take up to a quarter longer, most for small products.
#include <cstdint>

#include <ATen/core/Tensor.h>

namespace shardtune {

// Whether fp32 products of this process are fp32_gemm.hpp's: other bits than a library's.
bool has_own_fp32_products();

// left [M, K] and right [K, N] of one floating dtype, either dimension of each may be the dense one (x, x.t()) -> [M,
// N]. bias [N] or undefined: added to every row. No autograd.
at::Tensor matrix_product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias = {});

// The same with `right` in parts along dim 0 or 1. They are put together first, except where bf16_gemm.hpp
// or fp32_gemm.hpp multiplies and all parts but the last are multiples of 32 long.
at::Tensor matrix_product(const at::Tensor& left, at::TensorList right_parts, std::int64_t dim, const at::Tensor& bias);

// matrix_product(left, right) in `dtype`, which holds all its numbers; not rounded less for that.
at::Tensor matrix_product_in(at::ScalarType dtype, const at::Tensor& left, const at::Tensor& right);

// into [M, N] += left right, fp32 with dense rows. 16-bit products are rounded to 16 bits before they are added, except
// on a processor with bf16 products.
void matrix_product_add(const at::Tensor& left, const at::Tensor& right, at::Tensor& into);

}  // namespace shardtune
