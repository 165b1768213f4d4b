#include "kernels/embedding.hpp"

#include <utility>

#include <ATen/ATen.h>
#include <ATen/Parallel.h>
#include <fmt/format.h>
#include <torch/csrc/autograd/custom_function.h>

#include "core/error.hpp"
#include "kernels/element_type.hpp"
#include "kernels/simd.hpp"

namespace shardtune {
namespace {

struct TiedHolder : torch::CustomClassHolder {
  explicit TiedHolder(std::shared_ptr<TiedGradient> shared) : tied(std::move(shared)) {}
  std::shared_ptr<TiedGradient> tied;
};

// Threads own columns, never tokens: every element sees its additions in token order.
template <class T>
void add_rows(const at::Tensor& ids, const at::Tensor& grad, std::int64_t zero_row, at::Tensor& into) {
  const std::int64_t tokens = ids.numel(), width = grad.size(1);
  const auto* id = ids.const_data_ptr<std::int64_t>();
  const auto* from = grad.const_data_ptr<T>();
  auto* to = into.mutable_data_ptr<float>();
  const std::int64_t blocks = (width + simd::kLanes - 1) / simd::kLanes;
  at::parallel_for(0, blocks, 16, [&](std::int64_t begin, std::int64_t end) {
    simd::dispatch([&]() SHARDTUNE_VECTOR_BODY {
      for (std::int64_t t = 0; t < tokens; ++t) {
        if (id[t] == zero_row) continue;
        const T* g = from + t * width;
        float* w = to + id[t] * width;
        for (std::int64_t block = begin; block < end; ++block) {
          const std::int64_t at = block * simd::kLanes;
          simd::store_at(w, at, width, simd::load_at(w, at, width) + simd::load_at(g, at, width));
        }
      }
    });
  });
}

struct Embedding : torch::autograd::Function<Embedding> {
  static at::Tensor forward(torch::autograd::AutogradContext* ctx, const at::Tensor& weight, const at::Tensor& ids,
                            std::int64_t zero_row, const c10::intrusive_ptr<TiedHolder>& holder) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    ctx->save_for_backward({ids});
    ctx->saved_data["rows"] = weight.size(0);
    ctx->saved_data["zero_row"] = zero_row;
    ctx->saved_data["holder"] = c10::IValue::make_capsule(holder);
    return at::index_select(weight, 0, ids);
  }
  static torch::autograd::variable_list backward(torch::autograd::AutogradContext* ctx,
                                                 const torch::autograd::variable_list& grads) {
    const at::AutoDispatchBelowADInplaceOrView untracked;
    const at::Tensor ids = ctx->get_saved_variables()[0];
    const at::Tensor grad = grads[0].contiguous();
    const auto capsule = ctx->saved_data["holder"].toCapsule();
    TiedGradient* tied = static_cast<TiedHolder*>(capsule.get())->tied.get();
    at::Tensor sum;
    if (tied != nullptr) sum = std::exchange(tied->weight_grad, at::Tensor());
    if (!sum.defined()) sum = at::zeros({ctx->saved_data["rows"].toInt(), grad.size(1)}, at::kFloat);
    const std::int64_t zero_row = ctx->saved_data["zero_row"].toInt();
    with_element_type(grad.scalar_type(), [&](auto element) { add_rows<decltype(element)>(ids, grad, zero_row, sum); });
    return {sum, {}, {}, {}};
  }
};

void check_ids(const at::Tensor& ids, std::int64_t rows) {
  const auto* id = ids.const_data_ptr<std::int64_t>();
  for (std::int64_t t = 0; t < ids.numel(); ++t)
    if (id[t] < 0 || id[t] >= rows)
      fail(ErrorKind::data, fmt::format("id {} at position {} of the batch is outside the model's table of {} rows; "
                                        "tokenizer and model do not belong together",
                                        id[t], t, rows));
}

}  // namespace

at::Tensor embedding_lookup(const at::Tensor& ids, const at::Tensor& weight, std::int64_t zero_row,
                            std::shared_ptr<TiedGradient> tied) {
  const at::Tensor flat_ids = ids.contiguous();
  check_ids(flat_ids, weight.size(0));
  return Embedding::apply(weight, flat_ids, zero_row, c10::make_intrusive<TiedHolder>(std::move(tied)));
}

at::Tensor embedding_reference(const at::Tensor& ids, const at::Tensor& weight, std::int64_t zero_row) {
  return at::embedding(weight, ids, zero_row);
}

}  // namespace shardtune
