#include "trainer/precision_note.hpp"

#include <fmt/format.h>

#include "core/log.hpp"

namespace shardtune {

std::string slow_precision_note(const TrainOptions& train, const HalfPrecision& processor) {
  const bool is_slow = (train.bf16 && !processor.has_bf16) || (train.fp16 && !processor.has_fp16);
  if (!is_slow) return "";
  const char* name = train.bf16 ? "bf16" : "fp16";
  return fmt::format(
      "--{0} true: this processor has no {0} arithmetic (avx512_{0}), so it is slower here than fp32 and saves "
      "memory only; leave --{0} out where fp32 fits",
      name);
}

void warn_of_slow_precision(const TrainOptions& train) {
  const std::string note = slow_precision_note(train, half_precision());
  if (!note.empty()) log::warn("{}", note);
}

}  // namespace shardtune
