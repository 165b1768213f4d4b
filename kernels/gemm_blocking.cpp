#include "kernels/gemm_blocking.hpp"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

#include "core/error.hpp"

namespace shardtune::packed {
namespace {

// The sums of a block of the result and one side of it stay in the second-level cache, the other side comes from
// beyond.
constexpr std::int64_t kNarrow = 1024, kSums = 192 * 1024;
constexpr double kUneven = 1.02;  // less is not worth another way
constexpr std::int64_t kSmall = 4 << 20;
// The gradient of a classifier's input sums over its many classes: packing all of the weights would take their memory again,
// while the sums of the whole result are few.
constexpr std::int64_t kDeep = 8, kManyTerms = 16 * 1024, kSpanNumbers = 256 * 1024, kFewSums = 16 << 20;

// Of the other dimension of a block whose sums stay in the cache.
std::int64_t beside(std::int64_t size) { return std::clamp<std::int64_t>(kSums / size / kBlock * kBlock, 64, 512); }
// How many times as long as all threads would take together the busiest one takes, for a dimension shared out by
// blocks.
double unevenness(std::int64_t size) {
  const std::int64_t threads = at::get_num_threads(), blocks = padded(size) / kBlock;
  return static_cast<double>((blocks + threads - 1) / threads * threads) / static_cast<double>(blocks);
}

}  // namespace

Blocking::Blocking(std::int64_t m_, std::int64_t n_, std::int64_t k_, const Limits& limits) : m(m_), n(n_), k(k_) {
  const std::int64_t chunks = (k + limits.deepest - 1) / limits.deepest;
  chunk = padded((k + chunks - 1) / chunks);
  const bool is_shallow = padded(k) <= kNarrow;
  // A classifier; a weight's gradient.
  const bool is_wide = is_shallow ? n >= 4 * m : padded(n) > kNarrow && padded(m) <= kNarrow;
  const bool is_small = padded(m) * padded(k) <= kSmall;  // tasks by columns pack all of the left side
  if (is_wide || (is_small && unevenness(m) > kUneven * unevenness(n))) tasks = BlockTasks::columns;
  own.size = tasks == BlockTasks::rows ? m : n;
  shared.size = tasks == BlockTasks::rows ? n : m;
  if (is_wide && is_shallow) {
    own.block = shared.block = 256;
  } else if (padded(shared.size) <= kNarrow) {
    shared.block = padded(shared.size);
    own.block = beside(shared.block);
    packs_all_depth = false;
  } else if (is_shallow) {
    shared.block = 128;
    own.block = std::clamp<std::int64_t>(limits.own_numbers / padded(k) / kBlock * kBlock, 64, 512);
  } else {
    shared.block = 768;
    own.block = 256;
    packs_all_depth = false;
  }
  own.block = std::min(own.block, padded(own.size));
  const bool has_spans = k > kManyTerms && own.size * kDeep <= k && padded(m) * padded(n) <= kFewSums;
  span = has_spans ? std::max<std::int64_t>(1, kSpanNumbers / padded(shared.size) / chunk) * chunk : padded(k);
}

RightSide::RightSide(at::TensorList parts, std::int64_t dim) : parts_(parts), dim_(dim) {
  for (const at::Tensor& part : parts_) {
    check_internal(part.dim() == 2 && part.stride(has_dense_rows() ? 1 : 0) == 1 && part.scalar_type() == dtype() &&
                       part.size(1 - dim_) == parts_[0].size(1 - dim_) && begin_ % kBlock == 0,
                   "the right side of a product is [K, N] with one dense dimension, in parts of multiples of 32");
    begin_ += part.size(dim_);
  }
}

const at::Tensor& RightSide::part_at(std::int64_t& k, std::int64_t& n) const {
  std::int64_t& along = dim_ == 0 ? k : n;
  std::size_t i = 0;
  while (along >= parts_[i].size(dim_)) along -= parts_[i++].size(dim_);
  return parts_[i];
}

void check_product(const at::Tensor& left, const RightSide& right, at::ScalarType dtype) {
  check_internal(left.dim() == 2 && left.size(1) == right.rows() && (left.stride(1) == 1 || left.stride(0) == 1) &&
                     left.scalar_type() == dtype && right.dtype() == dtype,
                 "a packed product takes left [M, K] and right [K, N] of its dtype, each with one dense dimension");
}

void in_parallel(std::int64_t size, const std::function<void(std::int64_t, std::int64_t)>& run) {
  at::parallel_for(0, size, 1, run);
}

at::Tensor empty_bytes(std::int64_t bytes) { return at::empty({bytes}, at::kByte); }

}  // namespace shardtune::packed
