// Dropout: the mask's definition, its statistics, what it depends on and what it does not.
#include "kernels/dropout.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <vector>

#include <ATen/ATen.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/error.hpp"
#include "tests/kernels/support.hpp"
#include "tests/support/error_of.hpp"

namespace shardtune::testing {
namespace {

std::vector<float> mask_row(const DropoutSite& site, std::uint64_t row, std::size_t size) {
  std::vector<float> mask(size);
  fill_dropout_row(site, row, mask);
  return mask;
}

double dropped_share(const std::vector<float>& mask) {
  double dropped = 0;
  for (const float m : mask) dropped += m == 0.0F ? 1 : 0;
  return dropped / static_cast<double>(mask.size());
}

// Share of elements that both masks drop.
double common_share(const std::vector<float>& a, const std::vector<float>& b) {
  double both = 0;
  for (std::size_t i = 0; i < a.size(); ++i) both += a[i] == 0.0F && b[i] == 0.0F ? 1 : 0;
  return both / static_cast<double>(a.size());
}

// Five standard deviations of the share of n independent events of probability p.
double five_deviations(double p, std::size_t n) { return 5 * std::sqrt(p * (1 - p) / static_cast<double>(n)); }

TEST(Dropout, BitsAreTheMultipliersOfTheSameRow) {
  for (const double probability : {0.0, 0.1, 0.7, 1.0}) {
    const DropoutSite site{.probability = probability, .key = 11};
    std::vector<std::uint64_t> bits(5);
    fill_dropout_bits(site, 77, bits);
    const std::vector<float> mask = mask_row(site, 77, 64 * bits.size());
    for (std::size_t i = 0; i < mask.size(); ++i)
      EXPECT_EQ((bits[i / 64] >> (i % 64) & 1U) != 0 ? dropout_keep_scale(site) : 0.0F, mask[i]) << probability << " at " << i;
  }
}

TEST(Dropout, EqualsTheReferenceBitForBitForwardAndBackward) {
  for (const std::vector<std::int64_t>& shape :
       std::vector<std::vector<std::int64_t>>{{0}, {1}, {3, 5}, {1, 64}, {7, 33}, {65, 48}, {2, 3, 171}, {40, 1003}})
    for (const at::ScalarType dtype : kDtypes)
      for (const double probability : {0.0, 0.1, 0.5, 1.0}) {
        const DropoutSite site{.probability = probability, .key = 0xFEDCBA9876543210U};
        const at::Tensor x = leaf(random_tensor(1, shape, dtype)), seed = random_tensor(2, shape, dtype);
        const at::Tensor y = dropout(x * 1, site);
        const std::string what = fmt::format("{} numbers, p {}", x.numel(), probability);
        EXPECT_TRUE(at::equal(y, dropout_reference(x, site))) << what;
        EXPECT_TRUE(at::equal(gradients(y, seed, {x})[0], dropout_reference(seed, site))) << what << " gradient";
      }
}

TEST(Dropout, AddedToAResidualItIsTheSameBitForBitForwardAndBackward) {
  for (const std::vector<std::int64_t>& shape :
       std::vector<std::vector<std::int64_t>>{{0}, {1}, {7, 33}, {2, 3, 171}, {40, 1003}})
    for (const at::ScalarType dtype : kDtypes)
      for (const double probability : {0.0, 0.3, 1.0}) {
        const DropoutSite site{.probability = probability, .key = 8};
        const auto compute = [&](bool is_fused) {
          const at::Tensor residual = leaf(random_tensor(1, shape, dtype)), x = leaf(random_tensor(2, shape, dtype));
          const at::Tensor y = is_fused ? add_dropout(residual, x, site) : residual + dropout(x, site);
          std::vector<at::Tensor> all = gradients(y, random_tensor(3, shape, dtype), {residual, x});
          all.push_back(y);
          return all;
        };
        expect_same_bits(compute(true), compute(false), fmt::format("{} p {}", at::toString(dtype), probability));
      }
  const auto mismatched = [] { add_dropout(at::ones({3, 4}), at::ones({4}), {}); };
  EXPECT_NE(testing_support::error_of(ErrorKind::internal, mismatched), "");
}

TEST(Dropout, AnyPartOfARowIsTheSameMask) {
  const DropoutSite site{.probability = 0.3, .key = 77};
  const std::vector<float> whole = mask_row(site, 9, 400);
  for (const std::size_t first : {0U, 1U, 63U, 64U, 100U, 128U})
    for (const std::size_t size : {0U, 1U, 27U, 64U, 65U, 200U}) {
      std::vector<float> part(size);
      fill_dropout_row(site, 9, part, first);
      const auto begin = whole.begin() + static_cast<std::ptrdiff_t>(first);
      EXPECT_TRUE(std::equal(part.begin(), part.end(), begin)) << first << " " << size;
    }
}

TEST(Dropout, OneElementAtATimeIsTheSameMask) {
  const DropoutSite site{.probability = 0.3, .key = 77};
  for (const std::uint64_t row : {std::uint64_t{0}, std::uint64_t{5} << 16, (std::uint64_t{1} << 40) + 3}) {
    const std::vector<float> mask = mask_row(site, row, 331);
    for (std::size_t i = 0; i < mask.size(); ++i)
      ASSERT_EQ(mask[i], dropout_multiplier(site, row, i)) << row << " " << i;
  }
}

TEST(Dropout, RatesAreRightAndNeighboursIndependent) {
  constexpr std::size_t kSize = 1'000'003;
  for (const double p : {0.01, 0.1, 0.5, 0.9}) {
    const std::vector<float> mask = mask_row({.probability = p, .key = 1}, 0, kSize);
    EXPECT_NEAR(dropped_share(mask), p, five_deviations(p, kSize));
    const std::set<float> values(mask.begin(), mask.end());
    EXPECT_EQ(values, (std::set<float>{0.0F, static_cast<float>(1 / (1 - p))})) << "kept values keep the mean";
    for (const std::size_t distance : {1U, 2U, 15U, 16U, 17U, 64U, 768U}) {
      const std::vector<float> shifted(mask.begin() + static_cast<std::ptrdiff_t>(distance), mask.end());
      EXPECT_NEAR(common_share(shifted, mask), p * p, five_deviations(p * p, shifted.size())) << p << " " << distance;
    }
    EXPECT_NEAR(common_share(mask, mask_row({.probability = p, .key = 1}, 1, kSize)), p * p,
                five_deviations(p * p, kSize))
        << "two rows";
  }
}

TEST(Dropout, EveryPartOfTheKeyGivesAnIndependentMaskAndNothingElseMatters) {
  constexpr std::size_t kSize = 200'000;
  constexpr double kP = 0.2;
  const ForwardContext context{.is_training = true, .seed = 42, .step = 10, .micro_batch = 3};
  const auto mask_of = [&](const ForwardContext& c, std::int64_t site) {
    return mask_row(make_dropout_site(c, site, kP), 0, kSize);
  };
  const std::vector<float> mask = mask_of(context, 17);
  EXPECT_EQ(mask, mask_of(context, 17));
  ForwardContext other_seed = context, other_step = context, other_batch = context, swapped = context;
  other_seed.seed = 43;
  other_step.step = 11;
  other_batch.micro_batch = 4;
  std::swap(swapped.step, swapped.micro_batch);
  for (const auto& other : {mask_of(other_seed, 17), mask_of(other_step, 17), mask_of(other_batch, 17),
                            mask_of(swapped, 17), mask_of(context, 18)})
    EXPECT_NEAR(common_share(mask, other), kP * kP, five_deviations(kP * kP, kSize));
  // The shape is no part of it: the first elements of a longer tensor see the same mask.
  const DropoutSite site = make_dropout_site(context, 17, kP);
  const at::Tensor wide = dropout(at::ones({40, 50}), site), flat = dropout(at::ones({777}), site);
  EXPECT_TRUE(at::equal(wide.flatten().slice(0, 0, 777), flat));
}

TEST(Dropout, OffOutsideTrainingAndForProbabilityZero) {
  const ForwardContext training{.is_training = true};
  EXPECT_FALSE(make_dropout_site({}, 1, 0.5).is_active());
  EXPECT_FALSE(make_dropout_site(training, 1, 0.0).is_active());
  EXPECT_TRUE(make_dropout_site(training, 1, 0.5).is_active());
  const at::Tensor x = random_tensor(1, {5});
  EXPECT_EQ(dropout(x, {}).const_data_ptr(), x.const_data_ptr()) << "no copy when off";
}

TEST(Dropout, RepeatedForwardAndBackwardSeeOneMask) {
  // What recomputation does: the second forward pass and the backward pass must drop the same elements.
  const DropoutSite site{.probability = 0.4, .key = 5};
  const at::Tensor ones = at::ones({9, 77}), x = leaf(ones);
  const at::Tensor first = dropout(x, site), second = dropout(x, site);
  EXPECT_TRUE(at::equal(first, second));
  EXPECT_TRUE(at::equal(gradients(second, ones, {x})[0], first.detach()));
}

TEST(Dropout, DroppedInfinitiesAreZeroAndNanStaysWhereKept) {
  const DropoutSite site{.probability = 0.5, .key = 5};
  const at::Tensor kept = dropout(at::ones({100}), site) != 0;
  const at::Tensor y = dropout(at::full({100}, std::numeric_limits<float>::infinity()), site);
  EXPECT_TRUE(at::equal(at::isinf(y), kept));
  EXPECT_EQ(y.masked_select(kept.logical_not()).sum().item<float>(), 0);
  EXPECT_TRUE(at::equal(at::isnan(dropout(at::full({100}, std::nan("")), site)), kept));
}

TEST(Dropout, SavesNothingForBackwardAndThreadsChangeNoBit) {
  const DropoutSite site{.probability = 0.1, .key = 5};
  const at::Tensor x = leaf(random_tensor(1, {300, 333}));
  at::Tensor y;
  const std::int64_t bytes = peak_bytes_of([&] { y = dropout(x, site); });
  EXPECT_EQ(bytes, x.numel() * 4) << "the result only";
  expect_same_bits_for_any_thread_count(
      [&] {
        const at::Tensor own = leaf(x), out = dropout(own, site);
        return std::vector<at::Tensor>{out, gradients(out, at::ones_like(out), {own})[0]};
      },
      "dropout");
}

}  // namespace
}  // namespace shardtune::testing
