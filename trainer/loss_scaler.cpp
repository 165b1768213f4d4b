#include "trainer/loss_scaler.hpp"

#include <cmath>

#include "core/error.hpp"

namespace shardtune {

void LossScaler::update(bool has_overflowed) {
  if (!is_on_) return;
  if (has_overflowed) {
    if (scale_ <= 1.0)
      fail(ErrorKind::numeric,
           "gradients overflow in fp16 although the loss scale is down to 1; lower --learning_rate, check the data, or "
           "train "
           "with --bf16. The last checkpoint is intact");
    scale_ *= kBackoff;
    growth_tracker_ = 0;
    return;
  }
  if (++growth_tracker_ < kGrowthInterval) return;
  growth_tracker_ = 0;
  if (std::isfinite(static_cast<float>(scale_ * kGrowth))) scale_ *= kGrowth;
}

}  // namespace shardtune
