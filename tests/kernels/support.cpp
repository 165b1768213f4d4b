#include "tests/kernels/support.hpp"

#include <cstring>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <gtest/gtest.h>

#include "core/memory.hpp"
#include "core/rng.hpp"

namespace shardtune::testing {
namespace {

class ThreadCountGuard {
 public:
  ThreadCountGuard() : before_(at::get_num_threads()) {}
  ~ThreadCountGuard() { at::set_num_threads(before_); }
  ThreadCountGuard(const ThreadCountGuard&) = delete;
  ThreadCountGuard& operator=(const ThreadCountGuard&) = delete;

 private:
  int before_;
};

}  // namespace

double unit_of(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? kUnitBf16 : dtype == at::kHalf ? kUnitFp16 : kUnit;
}

double half_denormal_step(at::ScalarType dtype) {
  return dtype == at::kBFloat16 ? 0x1p-134 : dtype == at::kHalf ? 0x1p-25 : 0x1p-150;
}

at::Tensor random_tensor(std::uint64_t key, const std::vector<std::int64_t>& shape, at::ScalarType dtype) {
  at::Tensor values = at::empty(shape, at::kFloat);
  PhiloxStream random(key);
  auto* data = values.mutable_data_ptr<float>();
  for (std::int64_t i = 0; i < values.numel(); ++i) data[i] = static_cast<float>(random.next_normal());
  return values.to(dtype);
}

at::Tensor leaf(const at::Tensor& value) { return value.detach().clone().requires_grad_(true); }
at::Tensor exact(const at::Tensor& value) { return value.detach().to(at::kDouble, false, true); }
at::Tensor double_leaf(const at::Tensor& value) { return exact(value).requires_grad_(true); }
at::Tensor magnitude(const at::Tensor& value) { return exact(value).abs(); }

void expect_within(const at::Tensor& actual, const at::Tensor& expected, const at::Tensor& slack,
                   const std::string& what) {
  ASSERT_TRUE(actual.defined()) << what;
  ASSERT_EQ(actual.sizes(), expected.sizes()) << what;
  if (actual.numel() == 0) return;
  const at::Tensor wanted = exact(expected), error = (exact(actual) - wanted).abs();
  const at::Tensor bound =
      exact(slack) + unit_of(actual.scalar_type()) * wanted.abs() + half_denormal_step(actual.scalar_type());
  const at::Tensor ratio = (error / bound).flatten();  // NaN compares as the largest
  const auto worst = ratio.argmax().item<std::int64_t>();
  EXPECT_LE(ratio[worst].item<double>(), 1.0)
      << what << ": element " << worst << " is " << exact(actual).flatten()[worst].item<double>() << ", expected "
      << wanted.flatten()[worst].item<double>() << ", bound " << bound.expand_as(error).flatten()[worst].item<double>();
}

void expect_same_bits(const at::Tensor& a, const at::Tensor& b, const std::string& what) {
  ASSERT_EQ(a.sizes(), b.sizes()) << what;
  ASSERT_EQ(a.scalar_type(), b.scalar_type()) << what;
  const at::Tensor left = a.detach().contiguous(), right = b.detach().contiguous();
  if (left.numel() == 0) return;
  EXPECT_EQ(std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()), 0) << what;
}

void expect_same_bits(const std::vector<at::Tensor>& a, const std::vector<at::Tensor>& b, const std::string& what) {
  ASSERT_EQ(a.size(), b.size());
  ASSERT_FALSE(a.empty());
  for (std::size_t i = 0; i < a.size(); ++i) expect_same_bits(a[i], b[i], fmt::format("{}, tensor {}", what, i));
}

std::vector<at::Tensor> gradients(const at::Tensor& output, const at::Tensor& seed, std::vector<at::Tensor> inputs) {
  output.backward(seed.to(output.scalar_type()));
  for (at::Tensor& input : inputs) input = input.grad();
  return inputs;
}

void expect_same_bits_for_any_thread_count(const std::function<std::vector<at::Tensor>()>& compute,
                                           const std::string& what) {
  const ThreadCountGuard guard;
  at::set_num_threads(1);
  const std::vector<at::Tensor> single = compute();
  for (const int threads : {2, 3, 5}) {
    at::set_num_threads(threads);
    expect_same_bits(compute(), single, fmt::format("{}, {} threads", what, threads));
  }
}

void expect_same_bits_when_repeated(const std::function<std::vector<at::Tensor>()>& compute, const std::string& what) {
  const ThreadCountGuard guard;
  for (const int threads : {1, 3}) {
    at::set_num_threads(threads);
    const std::vector<at::Tensor> first = compute();
    const at::Tensor in_the_way = at::empty({1003});
    expect_same_bits(compute(), first, fmt::format("{}, {} threads", what, threads));
  }
}

std::int64_t peak_bytes_of(const std::function<void()>& work) {
  static const bool installed = [] {
    install_tensor_memory_counter();
    return true;
  }();
  EXPECT_TRUE(installed);
  reset_peak_tensor_bytes();
  const std::int64_t before = tensor_bytes();
  work();
  return peak_tensor_bytes() - before;
}

}  // namespace shardtune::testing
