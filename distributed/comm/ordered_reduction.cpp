#include "distributed/comm/ordered_reduction.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "core/error.hpp"

namespace shardtune {
namespace {

// Elements per pass: the partial results of a tree over thousands of pieces stay in the first two caches.
constexpr std::int64_t kBlock = 512;
constexpr int kMaxDepth = 16;  // of the tree

enum class Bf16 : std::uint16_t {};

float widen(Bf16 value) { return std::bit_cast<float>(static_cast<std::uint32_t>(value) << 16); }

// Round to nearest even; every NaN becomes the same one, as in c10::BFloat16.
Bf16 narrow(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const std::uint32_t rounded = (bits + 0x7FFFU + ((bits >> 16) & 1U)) >> 16;
  return static_cast<Bf16>(value == value ? rounded : 0x7FC0U);
}

template <class T>
auto load(T value) {
  if constexpr (std::is_same_v<T, Bf16>) {
    return widen(value);
  } else {
    return value;
  }
}

template <class To, class From>
To store(From value) {
  if constexpr (std::is_same_v<To, Bf16>) {
    return narrow(value);
  } else {
    return value;
  }
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
    if constexpr (std::is_floating_point_v<T>) {
      if (left != left || right != right) return left + right;
    }
    if constexpr (op == ReduceOp::max) return right > left ? right : left;
    return right < left ? right : left;
  }
}

// Two bf16 at a time, where they lie in a word: a third fewer instructions than widening and packing them.
template <ReduceOp op>
[[gnu::always_inline]] inline void combine_pairs(const Bf16* left, const Bf16* right, std::int64_t num_pairs,
                                                 Bf16* out) {
  static_assert(std::endian::native == std::endian::little);
  using Word [[gnu::may_alias, gnu::aligned(2)]] = std::uint32_t;
  const auto* left_words = reinterpret_cast<const Word*>(left);
  const auto* right_words = reinterpret_cast<const Word*>(right);
  auto* out_words = reinterpret_cast<Word*>(out);
  const auto rounded = [](float value) {  // in the upper half, what is below it is rubbish
    const auto bits = std::bit_cast<std::uint32_t>(value);
    const std::uint32_t result = bits + 0x7FFFU + ((bits >> 16) & 1U);
    return value == value ? result : 0x7FC00000U;
  };
#pragma GCC ivdep  // out is exactly one of the inputs or overlaps none
  for (std::int64_t i = 0; i < num_pairs; ++i) {
    const std::uint32_t l = left_words[i];
    const std::uint32_t r = right_words[i];
    const float first = combine<op>(std::bit_cast<float>(l << 16), std::bit_cast<float>(r << 16));
    const float second = combine<op>(std::bit_cast<float>(l & 0xFFFF0000U), std::bit_cast<float>(r & 0xFFFF0000U));
    out_words[i] = (rounded(second) & 0xFFFF0000U) | (rounded(first) >> 16);
  }
}

template <ReduceOp op, class Left, class Right, class Out>
[[gnu::always_inline]] inline void combine_all(const Left* left, const Right* right, std::int64_t count, Out* out) {
  if constexpr (std::is_same_v<Left, Bf16> && std::is_same_v<Right, Bf16> && std::is_same_v<Out, Bf16>) {
    const std::int64_t num_pairs = count / 2;
    combine_pairs<op>(left, right, num_pairs, out);
    if (count % 2 != 0) {
      const std::int64_t last = count - 1;
      out[last] = narrow(combine<op>(widen(left[last]), widen(right[last])));
    }
  } else {
#pragma GCC ivdep  // as above
    for (std::int64_t i = 0; i < count; ++i) out[i] = store<Out>(combine<op>(load(left[i]), load(right[i])));
  }
}

#if defined(__x86_64__)
template <ReduceOp op, class Left, class Right, class Out>
__attribute__((target("avx2"))) void combine_avx2(const Left* left, const Right* right, std::int64_t count, Out* out) {
  combine_all<op>(left, right, count, out);
}
template <ReduceOp op, class Left, class Right, class Out>
__attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512"))) void combine_avx512(
    const Left* left, const Right* right, std::int64_t count, Out* out) {
  combine_all<op>(left, right, count, out);
}

#define SHARDTUNE_AVX512_BF16 __attribute__((target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16")))

SHARDTUNE_AVX512_BF16 inline __m512 widen_sixteen(const Bf16* values) {
  const __m256i words = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(words), 16));
}

// The sum of two pieces of bf16. The instruction that rounds takes denormals for zeros and leaves NaNs as they are;
// where a sum is either, the ordinary loop adds these elements.
SHARDTUNE_AVX512_BF16 void add_avx512_bf16(const Bf16* left, const Bf16* right, std::int64_t count, Bf16* out) {
  constexpr std::int64_t kStep = 32;
  constexpr int kNanOrDenormal = 0x81 | 0x20;
  std::int64_t i = 0;
  for (; i + kStep <= count; i += kStep) {
    const __m512 first = _mm512_add_ps(widen_sixteen(left + i), widen_sixteen(right + i));
    const __m512 second = _mm512_add_ps(widen_sixteen(left + i + kStep / 2), widen_sixteen(right + i + kStep / 2));
    const int specials = _mm512_fpclass_ps_mask(first, kNanOrDenormal) | _mm512_fpclass_ps_mask(second, kNanOrDenormal);
    if (specials != 0) [[unlikely]] {
      combine_pairs<ReduceOp::sum>(left + i, right + i, kStep / 2, out + i);
    } else {
      _mm512_storeu_si512(out + i, reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(second, first)));
    }
  }
  combine_all<ReduceOp::sum>(left + i, right + i, count - i, out + i);
}
#endif

template <ReduceOp op, class Left, class Right, class Out>
void combine_block(const Left* left, const Right* right, std::int64_t count, Out* out,
                   [[maybe_unused]] ReductionInstructions instructions) {
#if defined(__x86_64__)
  if constexpr (op == ReduceOp::sum && std::is_same_v<Left, Bf16> && std::is_same_v<Right, Bf16> &&
                std::is_same_v<Out, Bf16>) {
    if (instructions == ReductionInstructions::avx512_bf16) return add_avx512_bf16(left, right, count, out);
  }
  if (instructions >= ReductionInstructions::avx512) return combine_avx512<op>(left, right, count, out);
  if (instructions == ReductionInstructions::avx2) return combine_avx2<op>(left, right, count, out);
#endif
  combine_all<op>(left, right, count, out);
}

// The tree over one block of elements.
template <ReduceOp op, class T>
class BlockTree {
 public:
  using Accumulator = decltype(load(T{}));
  BlockTree(std::span<const std::byte* const> pieces, ReductionInstructions instructions)
      : pieces_(pieces), instructions_(instructions) {}

  template <class Out>
  void reduce(std::int64_t begin, std::int64_t count, Out* out) {
    begin_ = begin;
    count_ = count;
    const std::size_t half = std::bit_ceil(pieces_.size()) / 2;
    const Operand left = evaluate(0, half, 0);
    combine(left, evaluate(half, half, 1), out);
  }

 private:
  // A piece as it came, or the sum of some.
  struct Operand {
    const T* leaf;
    const Accumulator* sum;
  };

  // The subtree over the pieces of [begin, begin + width) that exist; `depth` scratch blocks are in use.
  Operand evaluate(std::size_t begin, std::size_t width, std::size_t depth) {
    if (width == 1) return {reinterpret_cast<const T*>(pieces_[begin]) + begin_, nullptr};
    const std::size_t half = width / 2;
    if (begin + half >= pieces_.size()) return evaluate(begin, half, depth);
    const Operand left = evaluate(begin, half, depth);
    const Operand right = evaluate(begin + half, half, depth + 1);
    Accumulator* out = scratch_.data() + static_cast<std::int64_t>(depth) * kBlock;
    combine(left, right, out);
    return {nullptr, out};
  }

  template <class Out>
  void combine(const Operand& left, const Operand& right, Out* out) {
    if (left.leaf != nullptr && right.leaf != nullptr) {
      combine_block<op>(left.leaf, right.leaf, count_, out, instructions_);
    } else if (right.leaf != nullptr) {
      combine_block<op>(left.sum, right.leaf, count_, out, instructions_);
    } else {
      combine_block<op>(left.sum, right.sum, count_, out, instructions_);  // the left side is never the smaller one
    }
  }

  std::span<const std::byte* const> pieces_;
  ReductionInstructions instructions_;
  std::int64_t begin_ = 0;
  std::int64_t count_ = 0;
  alignas(64) std::array<Accumulator, static_cast<std::size_t>(kBlock* kMaxDepth)> scratch_;
};

template <ReduceOp op, class T, class Out>
void reduce(std::span<const std::byte* const> pieces, std::int64_t numel, Out* out,
            ReductionInstructions instructions) {
  if (pieces.size() == 1) {
    const T* piece = reinterpret_cast<const T*>(pieces[0]);
    if constexpr (std::is_same_v<T, Out>) {
      if (piece != out && numel > 0) std::memcpy(out, piece, static_cast<std::size_t>(numel) * sizeof(T));
    } else {
      for (std::int64_t i = 0; i < numel; ++i) out[i] = load(piece[i]);
    }
    return;
  }
  BlockTree<op, T> tree(pieces, instructions);
  // Two pieces need no scratch memory.
  const std::int64_t block = pieces.size() == 2 ? numel : kBlock;
  for (std::int64_t begin = 0; begin < numel; begin += block) {
    tree.reduce(begin, std::min(block, numel - begin), out + begin);
  }
}

template <class T, class Out = T>
void reduce(std::span<const std::byte* const> pieces, std::int64_t numel, ReduceOp op, std::byte* out,
            ReductionInstructions instructions) {
  Out* typed_out = reinterpret_cast<Out*>(out);
  switch (op) {
    case ReduceOp::sum: return reduce<ReduceOp::sum, T>(pieces, numel, typed_out, instructions);
    case ReduceOp::max: return reduce<ReduceOp::max, T>(pieces, numel, typed_out, instructions);
    case ReduceOp::min: return reduce<ReduceOp::min, T>(pieces, numel, typed_out, instructions);
  }
}

}  // namespace

ReductionInstructions best_reduction_instructions() noexcept {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    return __builtin_cpu_supports("avx512bf16") ? ReductionInstructions::avx512_bf16 : ReductionInstructions::avx512;
  }
  if (__builtin_cpu_supports("avx2")) return ReductionInstructions::avx2;
#endif
  return ReductionInstructions::portable;
}

void reduce_pieces(std::span<const std::byte* const> pieces, std::int64_t numel, const Reduction& reduction,
                   std::byte* out, ReductionInstructions instructions) {
  check_internal(!pieces.empty() && pieces.size() <= (std::size_t{1} << kMaxDepth), "reduce_pieces: number of pieces");
  switch (reduction.dtype) {
    case at::kFloat: return reduce<float>(pieces, numel, reduction.op, out, instructions);
    case at::kDouble: return reduce<double>(pieces, numel, reduction.op, out, instructions);
    case at::kBFloat16:
      if (reduction.is_partial) return reduce<Bf16, float>(pieces, numel, reduction.op, out, instructions);
      return reduce<Bf16>(pieces, numel, reduction.op, out, instructions);
    case at::kLong: return reduce<std::int64_t>(pieces, numel, reduction.op, out, instructions);
    case at::kByte: return reduce<std::uint8_t>(pieces, numel, reduction.op, out, instructions);
    default: fail(ErrorKind::internal, "reduce_pieces: unsupported dtype");
  }
}

void finish_partial(const std::byte* partial, std::int64_t numel, const Reduction& reduction, std::byte* out) {
  if (reduction.dtype == at::kBFloat16) {
    const auto* from = reinterpret_cast<const float*>(partial);
    auto* to = reinterpret_cast<Bf16*>(out);
    for (std::int64_t i = 0; i < numel; ++i) to[i] = narrow(from[i]);
  } else if (out != partial && numel > 0) {
    std::memcpy(out, partial, static_cast<std::size_t>(numel * reduction.in_bytes()));
  }
}

}  // namespace shardtune
