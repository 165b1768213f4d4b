#include "kernels/sum_of_squares.hpp"

#include <cstring>

#include "kernels/simd.hpp"

namespace shardtune {
namespace {

constexpr std::int64_t kSums = 8;
using Singles = float __attribute__((vector_size(32)));
using Doubles = double __attribute__((vector_size(64)));

}  // namespace

double sum_of_squares(const float* values, std::int64_t count) {
  Doubles sums{};
  const std::int64_t whole = count / kSums * kSums;
  simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
    Doubles in_register{};
    for (std::int64_t i = 0; i < whole; i += kSums) {
      Singles loaded;
      std::memcpy(&loaded, values + i, sizeof loaded);
      const Doubles wide = __builtin_convertvector(loaded, Doubles);
      in_register += wide * wide;
    }
    sums = in_register;
  });
  for (std::int64_t i = whole; i < count; ++i) sums[i - whole] += double{values[i]} * double{values[i]};
  return ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
}

}  // namespace shardtune
