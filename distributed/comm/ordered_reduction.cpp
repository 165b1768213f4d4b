#include "distributed/comm/ordered_reduction.hpp"

#include <algorithm>
#include <cmath>
#include <type_traits>
#include <vector>

#include <c10/util/BFloat16.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

// Elements per pass: the accumulators of 64 pieces still fit into a second-level cache.
constexpr std::int64_t kBlock = 1024;

template <class T>
bool is_nan(T value) {
  if constexpr (std::is_floating_point_v<T>) return std::isnan(value);
  return false;
}

template <ReduceOp op, class T>
T combine(T left, T right) {
  if constexpr (op == ReduceOp::sum) {
    if constexpr (std::is_integral_v<T>) {
      using Unsigned = std::make_unsigned_t<T>;  // signed overflow would be undefined
      return static_cast<T>(static_cast<Unsigned>(left) + static_cast<Unsigned>(right));
    } else {
      return left + right;
    }
  } else {
    if (is_nan(left) || is_nan(right)) return left + right;
    if constexpr (op == ReduceOp::max) return right > left ? right : left;
    return right < left ? right : left;
  }
}

template <ReduceOp op, class T, class Accumulator>
void reduce(const T* pieces, int num_pieces, std::int64_t numel, T* out) {
  std::vector<Accumulator> accumulators(static_cast<std::size_t>(num_pieces * std::min(kBlock, numel)));
  for (std::int64_t begin = 0; begin < numel; begin += kBlock) {
    const std::int64_t count = std::min(kBlock, numel - begin);
    for (int piece = 0; piece < num_pieces; ++piece) {
      const T* source = pieces + piece * numel + begin;
      std::copy(source, source + count, accumulators.data() + piece * count);
    }
    for (int stride = 1; stride < num_pieces; stride *= 2) {
      for (int piece = 0; piece + stride < num_pieces; piece += 2 * stride) {
        Accumulator* left = accumulators.data() + piece * count;
        const Accumulator* right = accumulators.data() + (piece + stride) * count;
        for (std::int64_t i = 0; i < count; ++i) left[i] = combine<op>(left[i], right[i]);
      }
    }
    for (std::int64_t i = 0; i < count; ++i) out[begin + i] = static_cast<T>(accumulators[static_cast<std::size_t>(i)]);
  }
}

template <class T, class Accumulator>
void reduce(const std::byte* pieces, int num_pieces, std::int64_t numel, ReduceOp op, std::byte* out) {
  const T* typed_pieces = reinterpret_cast<const T*>(pieces);
  T* typed_out = reinterpret_cast<T*>(out);
  switch (op) {
    case ReduceOp::sum: return reduce<ReduceOp::sum, T, Accumulator>(typed_pieces, num_pieces, numel, typed_out);
    case ReduceOp::max: return reduce<ReduceOp::max, T, Accumulator>(typed_pieces, num_pieces, numel, typed_out);
    case ReduceOp::min: return reduce<ReduceOp::min, T, Accumulator>(typed_pieces, num_pieces, numel, typed_out);
  }
}

}  // namespace

void reduce_pieces(const std::byte* pieces, int num_pieces, std::int64_t numel, at::ScalarType dtype, ReduceOp op,
                   std::byte* out) {
  switch (dtype) {
    case at::kFloat: return reduce<float, float>(pieces, num_pieces, numel, op, out);
    case at::kDouble: return reduce<double, double>(pieces, num_pieces, numel, op, out);
    case at::kBFloat16: return reduce<c10::BFloat16, float>(pieces, num_pieces, numel, op, out);
    case at::kLong: return reduce<std::int64_t, std::int64_t>(pieces, num_pieces, numel, op, out);
    case at::kByte: return reduce<std::uint8_t, std::uint8_t>(pieces, num_pieces, numel, op, out);
    default: fail(ErrorKind::internal, "reduce_pieces: unsupported dtype");
  }
}

}  // namespace shardtune
