#include "trainer/precision_check.hpp"

#include <cstdlib>
#include <string_view>

#include <fmt/format.h>

#include "core/error.hpp"
#include "core/log.hpp"

namespace shardtune {

std::string check_precision(const TrainOptions& train, const HalfPrecision& processor, bool is_emulation_wanted) {
  if (train.fp16 && !processor.has_fp16 && !is_emulation_wanted) {
    fail(ErrorKind::config,
         "--fp16 true: this processor has no fp16 arithmetic (avx512_fp16) and would take several times as long as in "
         "fp32; use --bf16 true, which has the range of fp32 and needs no loss scale, or leave --fp16 out "
         "(SHARDTUNE_EMULATE_FP16=1 in the environment emulates it nevertheless)");
  }
  const bool is_slow = (train.bf16 && !processor.has_bf16) || (train.fp16 && !processor.has_fp16);
  if (!is_slow) return "";
  const char* name = train.bf16 ? "bf16" : "fp16";
  return fmt::format(
      "--{0} true: this processor has no {0} arithmetic (avx512_{0}), so it is slower here than fp32 and saves "
      "memory only; leave --{0} out where fp32 fits",
      name);
}

void check_precision(const TrainOptions& train) {
  const char* wanted = std::getenv("SHARDTUNE_EMULATE_FP16");
  const std::string note = check_precision(train, half_precision(), wanted != nullptr && std::string_view(wanted) == "1");
  if (!note.empty()) log::warn("{}", note);
}

}  // namespace shardtune
