#pragma once
// What 16-bit arithmetic costs on this processor, before a run is begun with it.
#include <string>

#include "kernels/instruction_set.hpp"
#include "trainer/options.hpp"

namespace shardtune {

// The warning for --bf16 on a processor that emulates it, slower than fp32 but in less memory; empty when there is
// nothing to say. Error{config} for --fp16 on one that emulates it: that costs a multiple of the time. is_emulation_wanted
// (SHARDTUNE_EMULATE_FP16=1, for tests of a recipe) makes it a warning.
std::string check_precision(const TrainOptions& train, const HalfPrecision& processor, bool is_emulation_wanted);

// The same for this processor and its environment; prints the warning, on rank 0.
void check_precision(const TrainOptions& train);

}  // namespace shardtune
