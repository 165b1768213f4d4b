#pragma once
// Private to kernels/: fp32 matrix products of any size (packed_gemm.hpp: bits that depend neither on the number of
// threads nor on what other rows and columns there are), for processors with AVX-512.
#include <ATen/core/Tensor.h>

namespace shardtune {

// Whether these are the faster products of this processor, whatever SHARDTUNE_ISA says: where it has AVX-512 and is not
// Intel's. There MKL, which is ATen's way, takes vectors of half the width and must be kept to one thread
// (matrix_product.hpp); on Intel's own processors it is as fast as can be.
bool prefers_fp32_products();

// left [M, K] and right [K, N] fp32, either dimension of each may be the dense one; `right` in parts along `dim`, all
// but the last of them multiples of 32 long -> [M, N]. bias [N] fp32, dense, or undefined. instruction_set() >= avx512.
at::Tensor fp32_gemm(const at::Tensor& left, at::TensorList right_parts, std::int64_t dim, const at::Tensor& bias = {});
// into [M, N] += left right, dense rows.
void fp32_gemm_add(const at::Tensor& left, const at::Tensor& right, at::Tensor& into);

}  // namespace shardtune
