#pragma once
#include <cstdint>

namespace shardtune {

// Sum of squares of `count` fp32 values, in double: eight interleaved sums, added pairwise. (The square of a float is
// exact in double, so the bits depend on nothing but that order.) One thread.
double sum_of_squares(const float* values, std::int64_t count);

}  // namespace shardtune
