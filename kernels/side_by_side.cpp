#include "kernels/side_by_side.hpp"

#include <numeric>
#include <utility>

#include <ATen/ATen.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

bool are_cut_from_one(at::TensorList parts) {
  const at::Tensor& first = parts[0];
  const std::int64_t stride = first.stride(0);
  std::int64_t offset = first.storage_offset(), width = 0;
  for (const at::Tensor& part : parts) {
    if (!part.storage().is_alias_of(first.storage()) || part.storage_offset() != offset ||
        part.scalar_type() != first.scalar_type() || part.stride(0) != stride || part.stride(1) != 1)
      return false;
    offset += part.size(1);
    width += part.size(1);
  }
  return stride == width;
}

// Parts of x [M, N] along its columns, [M, sizes[i], inner]; inner 0: [M, sizes[i]].
struct Split : torch::autograd::Function<Split> {
  static torch::autograd::variable_list forward(torch::autograd::AutogradContext* /*ctx*/, const at::Tensor& x,
                                                const std::vector<std::int64_t>& sizes, std::int64_t inner) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    return (inner == 0 ? x : x.view({x.size(0), x.size(1) / inner, inner})).split_with_sizes(sizes, 1);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* /*ctx*/,
                                                 const torch::autograd::variable_list& grads) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    std::vector<at::Tensor> matrices;
    for (const at::Tensor& grad : grads) matrices.push_back(grad.flatten(1));
    return {side_by_side(matrices), at::Tensor(), at::Tensor()};
  }
};

}  // namespace

at::Tensor side_by_side(at::TensorList parts) {
  if (parts.size() == 1) return parts[0];
  if (!are_cut_from_one(parts)) return at::cat(parts, 1);
  return parts[0].as_strided({parts[0].size(0), parts[0].stride(0)}, parts[0].strides());
}

std::vector<at::Tensor> split_columns(const at::Tensor& x, std::vector<std::int64_t> sizes) {
  return Split::apply(x, std::move(sizes), std::int64_t{0});
}

std::vector<at::Tensor> split_heads(const at::Tensor& x, std::vector<std::int64_t> heads) {
  const std::int64_t num_heads = std::accumulate(heads.begin(), heads.end(), std::int64_t{0});
  check_internal(num_heads > 0 && x.size(1) % num_heads == 0, "split_heads takes rows of whole heads");
  return Split::apply(x, std::move(heads), x.size(1) / num_heads);
}

}  // namespace shardtune
