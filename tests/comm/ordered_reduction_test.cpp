// The sums themselves: the tree for any number of pieces, the same bits from every instruction set.
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include <ATen/ATen.h>
#include <gtest/gtest.h>

#include "distributed/comm/ordered_reduction.hpp"
#include "tests/comm/conformance.hpp"

namespace shardtune {
namespace {

std::vector<ReductionInstructions> available_sets() {
  using enum ReductionInstructions;
  std::vector<ReductionInstructions> sets = {portable, avx2, avx512, avx512_bf16};
  std::erase_if(sets, [](ReductionInstructions set) { return set > best_reduction_instructions(); });
  return sets;
}

std::vector<at::Tensor> make_pieces(int num_pieces, std::int64_t numel, at::ScalarType dtype) {
  std::vector<at::Tensor> pieces;
  for (int p = 0; p < num_pieces; ++p) pieces.push_back(conformance::make_input(p, numel, dtype));
  return pieces;
}

std::vector<const std::byte*> pointers(const std::vector<at::Tensor>& tensors) {
  std::vector<const std::byte*> result;
  for (const auto& tensor : tensors) result.push_back(static_cast<const std::byte*>(tensor.const_data_ptr()));
  return result;
}

bool same_bits(const at::Tensor& a, const at::Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.nbytes() == b.nbytes() &&
         std::memcmp(a.const_data_ptr(), b.const_data_ptr(), a.nbytes()) == 0;
}

TEST(ReducePieces, FollowsTheTreeForEveryNumberOfPiecesAndInstructionSet) {
  for (const auto dtype : {at::kFloat, at::kDouble, at::kBFloat16, at::kLong}) {
    for (const auto op : {ReduceOp::sum, ReduceOp::max, ReduceOp::min}) {
      for (int num_pieces = 1; num_pieces <= 17; ++num_pieces) {
        const std::int64_t numel = 1100 + num_pieces;  // blocks and a rest
        const auto pieces = make_pieces(num_pieces, numel, dtype);
        const at::Tensor expected = conformance::expected_reduction(num_pieces, numel, dtype, op);
        for (const auto set : available_sets()) {
          const at::Tensor out = at::empty({numel}, dtype);
          reduce_pieces(pointers(pieces), numel, {dtype, op}, static_cast<std::byte*>(out.mutable_data_ptr()), set);
          EXPECT_TRUE(same_bits(out, expected)) << num_pieces << " pieces of " << c10::toString(dtype);
        }
      }
    }
  }
}

TEST(ReducePieces, WritesOverAnyOfItsPieces) {
  for (const auto dtype : {at::kFloat, at::kBFloat16}) {
    for (const int num_pieces : {1, 2, 3, 8}) {
      for (int target = 0; target < num_pieces; ++target) {
        const auto pieces = make_pieces(num_pieces, 5003, dtype);
        reduce_pieces(pointers(pieces), 5003, {dtype, ReduceOp::sum},
                      static_cast<std::byte*>(pieces[static_cast<std::size_t>(target)].mutable_data_ptr()));
        EXPECT_TRUE(same_bits(pieces[static_cast<std::size_t>(target)],
                              conformance::expected_reduction(num_pieces, 5003, dtype, ReduceOp::sum)));
      }
    }
  }
}

TEST(ReducePieces, LeavesPartialSumsUnrounded) {
  // Two levels give the bits of one: (0 + 1) + (2 + 3).
  const auto pieces = make_pieces(4, 2001, at::kBFloat16);
  const auto all = pointers(pieces);
  std::vector<at::Tensor> halves = {at::empty({2001}), at::empty({2001})};
  const Reduction first{at::kBFloat16, ReduceOp::sum, /*is_partial=*/true};
  for (std::size_t half = 0; half < 2; ++half) {
    reduce_pieces(std::span(all).subspan(2 * half, 2), 2001, first,
                  static_cast<std::byte*>(halves[half].mutable_data_ptr()));
  }
  const at::Tensor sum = at::empty({2001});
  reduce_pieces(pointers(halves), 2001, {at::kFloat, ReduceOp::sum}, static_cast<std::byte*>(sum.mutable_data_ptr()));
  const at::Tensor rounded = at::empty({2001}, at::kBFloat16);
  finish_partial(static_cast<const std::byte*>(sum.const_data_ptr()), 2001, first,
                 static_cast<std::byte*>(rounded.mutable_data_ptr()));
  EXPECT_TRUE(same_bits(rounded, conformance::expected_reduction(4, 2001, at::kBFloat16, ReduceOp::sum)));
}

// All pairs of these, by every instruction set.
void expect_sums_as_tensors_have_them(const std::vector<float>& values) {
  std::vector<float> left, right;
  for (const float a : values) {
    for (const float b : values) {
      left.push_back(a);
      right.push_back(b);
    }
  }
  const auto numel = static_cast<std::int64_t>(left.size());
  const std::vector<at::Tensor> pieces = {at::tensor(left).to(at::kBFloat16), at::tensor(right).to(at::kBFloat16)};
  const at::Tensor expected = (pieces[0].to(at::kFloat) + pieces[1].to(at::kFloat)).to(at::kBFloat16);
  for (const auto set : available_sets()) {
    const at::Tensor out = at::empty({numel}, at::kBFloat16);
    reduce_pieces(pointers(pieces), numel, {at::kBFloat16, ReduceOp::sum},
                  static_cast<std::byte*>(out.mutable_data_ptr()), set);
    // Tensors have several NaNs, reductions one.
    EXPECT_TRUE(at::equal(at::isnan(out), at::isnan(expected)));
    EXPECT_TRUE(same_bits(at::nan_to_num(out, 5.0), at::nan_to_num(expected, 5.0)));
    const at::Tensor nan_bits = out.masked_select(at::isnan(out)).view(at::kShort);
    EXPECT_TRUE(nan_bits.eq(0x7FC0).all().item<bool>());
  }
}

TEST(ReducePieces, RoundsBf16AsTensorsDo) {
  // Ties, overflow to infinity: sums with zero are the value itself, so sum pairs that need rounding.
  std::vector<float> special = {0.0F, -0.0F, 1.0F, 3.3895e38F, -3.3895e38F, 1.00390625F, 257.0F, -1.0F, -1.0117188F};
  expect_sums_as_tensors_have_them(special);  // a loop that looks for what follows a block at a time finds none
  const std::vector<float> denormal = {1e-40F, 9.2e-41F, -1e-40F, 1.18e-38F, -1.19e-38F};
  special.insert(special.end(), denormal.begin(), denormal.end());
  expect_sums_as_tensors_have_them(special);
  special.push_back(std::numeric_limits<float>::infinity());
  expect_sums_as_tensors_have_them(special);
  special.push_back(-std::numeric_limits<float>::infinity());
  special.push_back(std::numeric_limits<float>::quiet_NaN());
  expect_sums_as_tensors_have_them(special);
}

}  // namespace
}  // namespace shardtune
