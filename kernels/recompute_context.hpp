#pragma once
// Selective recomputation: what a kernel keeps from a unit's first forward pass, so that its recomputation returns the
// kept result instead of computing it again. One object per run of a unit; a model hands it to its kernels, the first
// pass (without grad mode) stores, the recomputation (with grad mode) takes in the same order. Not thread-safe.
#include <cstdint>
#include <deque>
#include <utility>
#include <vector>

#include <ATen/core/Tensor.h>

namespace shardtune {

class RecomputeContext {
 public:
  using Tensors = std::vector<at::Tensor>;

  // Off: the kernels compute every pass as if there were no context. On at the start.
  void set_enabled(bool is_enabled) noexcept { is_enabled_ = is_enabled; }
  bool is_enabled() const noexcept { return is_enabled_; }

  void keep(Tensors results) { kept_.push_back(std::move(results)); }
  Tensors take() {
    Tensors results = std::move(kept_.front());
    kept_.pop_front();
    return results;
  }
  std::int64_t num_bytes() const {
    std::int64_t bytes = 0;
    for (const Tensors& results : kept_)
      for (const at::Tensor& tensor : results) bytes += static_cast<std::int64_t>(tensor.nbytes());
    return bytes;
  }

 private:
  std::deque<Tensors> kept_;
  bool is_enabled_ = true;
};

}  // namespace shardtune
