// Conversions of 16-bit formats: every fp16 and bf16 value, and the borders of rounding, as c10's scalar ones.
#include <bit>
#include <cmath>
#include <limits>
#include <vector>

#include <gtest/gtest.h>

#include "core/error.hpp"
#include "kernels/element_type.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

bool same(float a, float b) { return std::bit_cast<std::uint32_t>(a) == std::bit_cast<std::uint32_t>(b) || (std::isnan(a) && std::isnan(b)); }

template <class T>
void expect_loads_every_value() {
  for (std::uint32_t first = 0; first < 65536; first += 16) {
    T values[16];
    float wide[16];
    for (std::uint32_t i = 0; i < 16; ++i) values[i] = T(static_cast<std::uint16_t>(first + i), T::from_bits());
    simd::store(wide, simd::load(values));
    for (int i = 0; i < 16; ++i) ASSERT_TRUE(same(wide[i], static_cast<float>(values[i]))) << values[i].x;
  }
}

// Every value of the format, and what lies just below, at and above the middle to its neighbour.
template <class T>
void expect_rounds_as_scalar() {
  std::vector<float> inputs{0.0F, -0.0F, 1e-40F, 3e38F, -3e38F, std::numeric_limits<float>::infinity(), std::nanf("")};
  for (std::uint32_t bits = 0; bits < 65535; ++bits) {
    const auto a = static_cast<float>(T(static_cast<std::uint16_t>(bits), T::from_bits()));
    const auto b = static_cast<float>(T(static_cast<std::uint16_t>(bits + 1), T::from_bits()));
    const float middle = a + (b - a) / 2;
    for (const float x : {a, middle, std::nextafterf(middle, a), std::nextafterf(middle, b)}) inputs.push_back(x);
  }
  while (inputs.size() % 16 != 0) inputs.push_back(1.0F);
  for (std::size_t first = 0; first < inputs.size(); first += 16) {
    T rounded[16];
    simd::store(rounded, simd::load(inputs.data() + first));
    for (std::size_t i = 0; i < 16; ++i) {
      const T expected(inputs[first + i]);
      ASSERT_TRUE(rounded[i].x == expected.x || (std::isnan(static_cast<float>(rounded[i])) && std::isnan(static_cast<float>(expected))))
          << inputs[first + i] << ": " << rounded[i].x << " instead of " << expected.x;
    }
  }
}

TEST(ElementType, Fp16AndBf16AreReadExactly) {
  expect_loads_every_value<c10::Half>();
  expect_loads_every_value<c10::BFloat16>();
}

TEST(ElementType, Fp16AndBf16AreRoundedToNearestEven) {
  expect_rounds_as_scalar<c10::Half>();
  expect_rounds_as_scalar<c10::BFloat16>();
}

TEST(ElementType, OtherTypesAreRefused) { EXPECT_THROW(with_element_type(at::kDouble, [](auto) {}), Error); }

}  // namespace
}  // namespace shardtune
