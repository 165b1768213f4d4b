#include "kernels/matrix_product.hpp"

#include <algorithm>
#include <cstdlib>
#include <string_view>
#include <vector>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>

#include "kernels/bf16_gemm.hpp"
#include "kernels/block_size.hpp"
#include "kernels/fp32_gemm.hpp"
#include "kernels/instruction_set.hpp"

// MKL's own (mkl_service.h, which LibTorch does not bring along), absent from a LibTorch without MKL; and OpenMP's.
extern "C" int MKL_Set_Num_Threads_Local(int num_threads) __attribute__((weak));
extern "C" void omp_set_num_threads(int num_threads) __attribute__((weak));
extern "C" int omp_get_max_threads() __attribute__((weak));

namespace shardtune {
namespace {

constexpr std::int64_t kMostBlocks = 16, kLeastSize = 64, kMultiple = 16;

// Whether ATen's own way with threads will do: MKL reads the same variable.
bool keeps_order_of_sums(const at::Tensor& left) {
  static const bool is_strict = [] {
    const char* mode = std::getenv("MKL_CBWR");
    return mode != nullptr && std::string_view(mode).find("STRICT") != std::string_view::npos;
  }();
  return !left.is_cpu() || (is_strict && left.scalar_type() == at::kFloat);
}

// While it lives, products of this thread are computed, and their sums cut, as on one thread: LibTorch has MKL count on
// all its threads within parallel regions, too, and a single block is computed outside of any, where oneDNN takes all.
class OneThread {
 public:
  OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) mkl_before_ = MKL_Set_Num_Threads_Local(1);
    if (omp_set_num_threads == nullptr || omp_get_max_threads == nullptr) return;
    omp_before_ = omp_get_max_threads();
    omp_set_num_threads(1);
  }
  ~OneThread() {
    if (MKL_Set_Num_Threads_Local != nullptr) MKL_Set_Num_Threads_Local(mkl_before_);
    if (omp_before_ > 0) omp_set_num_threads(omp_before_);
  }
  OneThread(const OneThread&) = delete;
  OneThread& operator=(const OneThread&) = delete;

 private:
  int mkl_before_ = 0, omp_before_ = 0;
};

struct Operands {
  at::Tensor left, right, into;
  std::int64_t first_column;
};

// Calls visit for blocks of the result, on several threads. Cut along the longer side, so that the operand which every
// block reads as a whole is the smaller one.
template <class Visit>
void for_each_block(const at::Tensor& left, const at::Tensor& right, const at::Tensor& into, Visit visit) {
  const std::int64_t rows = into.size(0), columns = into.size(1), size = std::max(rows, columns);
  const std::int64_t wanted = (size + kMostBlocks - 1) / kMostBlocks;
  const std::int64_t block = std::max(kLeastSize, (wanted + kMultiple - 1) / kMultiple * kMultiple);
  at::parallel_for(0, (size + block - 1) / block, 1, [&](std::int64_t begin, std::int64_t end) {
    const at::NoGradGuard no_grad;  // each thread has a mode of its own
    const OneThread one_thread;
    for (std::int64_t first = begin * block; first < std::min(end * block, size); first += block) {
      const std::int64_t count = std::min(block, size - first);
      if (rows >= columns) {
        visit(Operands{left.narrow(0, first, count), right, into.narrow(0, first, count), 0});
      } else {
        visit(Operands{left, right.narrow(1, first, count), into.narrow(1, first, count), first});
      }
    }
  });
}

bool takes_fp32_products(const at::Tensor& left) {
  return left.scalar_type() == at::kFloat && left.is_cpu() && has_own_fp32_products();
}
bool has_own_product(const at::Tensor& left) { return takes_bf16_products(left) || takes_fp32_products(left); }
at::Tensor own_product(const at::Tensor& left, at::TensorList right_parts, std::int64_t dim, const at::Tensor& bias) {
  return takes_bf16_products(left) ? bf16_gemm(left, right_parts, dim, bias) : fp32_gemm(left, right_parts, dim, bias);
}

// Of parts [K, N] along `dim`, in their order in memory: which side is dense decides how some libraries sum.
at::Tensor joined(at::TensorList parts, std::int64_t dim) {
  if (parts[0].stride(1) == 1) return at::cat(parts, dim);
  std::vector<at::Tensor> transposed;
  for (const at::Tensor& part : parts) transposed.push_back(part.t());
  return at::cat(transposed, 1 - dim).t();
}

}  // namespace

bool has_own_fp32_products() { return prefers_fp32_products() && instruction_set() >= InstructionSet::avx512; }

at::Tensor matrix_product(const at::Tensor& left, const at::Tensor& right, const at::Tensor& bias) {
  if (has_own_product(left)) return own_product(left, right, 0, bias);
  if (keeps_order_of_sums(left)) return bias.defined() ? at::addmm(bias, left, right) : at::mm(left, right);
  at::Tensor result = at::empty({left.size(0), right.size(1)}, left.options());
  for_each_block(left, right, result, [&](Operands block) {
    if (bias.defined()) {
      at::addmm_out(block.into, bias.narrow(0, block.first_column, block.into.size(1)), block.left, block.right);
    } else {
      at::mm_out(block.into, block.left, block.right);
    }
  });
  return result;
}

at::Tensor matrix_product(const at::Tensor& left, at::TensorList right_parts, std::int64_t dim,
                          const at::Tensor& bias) {
  if (right_parts.size() == 1) return matrix_product(left, right_parts[0], bias);
  const auto all_but_last = right_parts.slice(0, right_parts.size() - 1);
  const bool is_cut_at_blocks = std::all_of(all_but_last.begin(), all_but_last.end(), [dim](const at::Tensor& part) {
    return part.size(dim) % packed::kBlock == 0;
  });
  if (has_own_product(left) && is_cut_at_blocks) return own_product(left, right_parts, dim, bias);
  return matrix_product(left, joined(right_parts, dim), bias);
}

at::Tensor matrix_product_in(at::ScalarType dtype, const at::Tensor& left, const at::Tensor& right) {
  if (dtype == at::kFloat && takes_bf16_products(left)) return bf16_gemm_widened(left, right);
  return matrix_product(left, right).to(dtype);
}

void matrix_product_add(const at::Tensor& left, const at::Tensor& right, at::Tensor& into) {
  if (takes_bf16_products(left)) return bf16_gemm_add(left, right, into);
  if (takes_fp32_products(left)) return fp32_gemm_add(left, right, into);
  if (left.scalar_type() == at::kFloat && keeps_order_of_sums(left)) {
    into.addmm_(left, right);
    return;
  }
  for_each_block(left, right, into, [](Operands block) {
    if (block.left.scalar_type() == at::kFloat) {
      block.into.addmm_(block.left, block.right);
    } else {
      block.into.add_(at::mm(block.left, block.right));
    }
  });
}

}  // namespace shardtune
