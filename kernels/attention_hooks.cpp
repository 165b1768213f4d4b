#include "kernels/attention_hooks.hpp"

#include <ATen/ATen.h>
#include <ATen/Parallel.h>

namespace shardtune {

Reach reach_of(const AttentionOptions& options) {
  const bool is_windowed = options.window > 0;
  return {.behind = !is_windowed        ? Reach::kUnlimited
                    : options.is_causal ? options.window - 1
                                        : options.window,
          .ahead = options.is_causal ? 0
                   : is_windowed     ? options.window
                                     : Reach::kUnlimited};
}

bool has_hooks(const AttentionOptions& options, std::int64_t length) {
  return options.soft_cap > 0 || options.relative_bias.defined() || reach_of(options).behind < length - 1;
}

DistanceTable::DistanceTable(const at::Tensor& bias, std::int64_t longest) : longest_(longest) {
  if (!bias.defined() || longest == 0) return;
  table_ = at::zeros({bias.size(0), row_size(longest)}, at::kFloat);
  const std::int64_t skipped = (bias.size(1) + 1) / 2 - longest, used = 2 * longest - 1;
  table_.slice(1, kMargin, kMargin + used).copy_(bias.slice(1, skipped, skipped + used));
}

at::Tensor make_diagonal_sums(std::int64_t num_heads, std::int64_t tokens) {
  return at::zeros({num_heads, 2 * tokens}, at::kFloat);
}

at::Tensor sum_over_segments(const at::Tensor& sums, const std::vector<std::int64_t>& offsets, std::int64_t width) {
  at::Tensor total = at::zeros({sums.size(0), width}, at::kFloat);
  const auto* from = sums.const_data_ptr<float>();
  auto* into = total.mutable_data_ptr<float>();
  at::parallel_for(0, sums.size(0), 1, [&](std::int64_t first, std::int64_t last) {
    for (std::int64_t head = first; head < last; ++head)
      for (std::size_t s = 0; s + 1 < offsets.size(); ++s) {
        const std::int64_t n = offsets[s + 1] - offsets[s];
        const float* part = from + head * sums.size(1) + 2 * offsets[s];
        float* whole = into + head * width + (width - 1) / 2 - (n - 1);
        for (std::int64_t d = 0; d < 2 * n - 1; ++d) whole[d] += part[d];
      }
  });
  return total;
}

}  // namespace shardtune
