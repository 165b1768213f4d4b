#pragma once
// What the kernel tests share: inputs, error bounds, gradients, thread counts, tensor memory.
//
// Bounds follow the standard model of rounding: a result made by k fp32 roundings from terms whose absolute values sum
// to M lies within k * 2^-24 * M of the exact one, and storing it in bf16 adds 2^-8 of the value, in fp16 2^-11.
// References are computed in fp64 from the same (already rounded) inputs, so nothing else may differ.
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include <ATen/core/Tensor.h>
#include <c10/core/ScalarType.h>

namespace shardtune::testing {

inline constexpr double kUnit = 0x1p-24;     // half the spacing of fp32 at 1
inline constexpr double kUnitBf16 = 0x1p-8;  // half the spacing of bf16 at 1

inline constexpr double kUnitFp16 = 0x1p-11;

inline constexpr at::ScalarType kDtypes[] = {at::kFloat, at::kBFloat16, at::kHalf};
double unit_of(at::ScalarType dtype);
double half_denormal_step(at::ScalarType dtype);  // error of rounding numbers too small to be normal

// Standard normal numbers, a function of (key, shape) alone, rounded to dtype.
at::Tensor random_tensor(std::uint64_t key, const std::vector<std::int64_t>& shape, at::ScalarType dtype = at::kFloat);
at::Tensor leaf(const at::Tensor& value);         // a copy that wants a gradient
at::Tensor double_leaf(const at::Tensor& value);  // the same in fp64
at::Tensor exact(const at::Tensor& value);        // fp64 copy without gradient
at::Tensor magnitude(const at::Tensor& value);    // fp64 absolute values

// |actual - expected| <= slack + unit_of(actual's dtype) * |expected|, element by element, nothing NaN or infinite.
// `slack` (fp64, broadcast) is what the arithmetic before the last rounding may be off; half the step of the dtype's
// denormal numbers is always allowed.
void expect_within(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& slack,
                   const std::string& what);
void expect_same_bits(const at::Tensor& a, const at::Tensor& b, const std::string& what);
void expect_same_bits(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b, const std::string& what);

// output.backward(seed) and the gradients of `inputs`.
std::vector<at::Tensor> gradients(const at::Tensor& output, const at::Tensor& seed, std::vector<at::Tensor> inputs);

// Runs `compute` with 1, 2, 3 and 5 threads and expects the same bits each time.
void expect_same_bits_for_any_thread_count(const std::function<std::vector<at::Tensor>()>& compute,
                                           const std::string& what);
// For what ATen's and MKL's matrix products decide: the same bits in two runs, at other addresses, with 1 and 3
// threads.
void expect_same_bits_when_repeated(const std::function<std::vector<at::Tensor>()>& compute, const std::string& what);

// Tensor bytes that `work` holds at most at once, beyond those held before it.
std::int64_t peak_bytes_of(const std::function<void()>& work);

}  // namespace shardtune::testing
