#pragma once
// The dynamic loss scale of fp16 training (torch.amp.GradScaler with its defaults, as accelerate uses it): halved when
// a gradient overflows, doubled after 2000 steps in a row without. A power of two, so scaling loses no bit. A value.
#include <cstdint>

namespace shardtune {

class LossScaler {
 public:
  static constexpr double kInitialScale = 65536.0;
  static constexpr double kGrowth = 2.0;
  static constexpr double kBackoff = 0.5;
  static constexpr std::int64_t kGrowthInterval = 2000;

  LossScaler() = default;  // of other precisions: the scale is 1 and stays so
  // growth_tracker: steps since the last change of the scale.
  LossScaler(double scale, std::int64_t growth_tracker)
      : scale_(scale), growth_tracker_(growth_tracker), is_on_(true) {}

  bool is_on() const noexcept { return is_on_; }
  double scale() const noexcept { return scale_; }
  std::int64_t growth_tracker() const noexcept { return growth_tracker_; }

  // After every step. Error{numeric} when gradients overflow although the scale is 1: smaller scales only lose digits.
  void update(bool has_overflowed);

 private:
  double scale_ = 1.0;
  std::int64_t growth_tracker_ = 0;
  bool is_on_ = false;
};

}  // namespace shardtune
