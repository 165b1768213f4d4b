#pragma once
// What the user should know before waiting for a run: 16-bit arithmetic may cost time instead of saving it.
#include <string>

#include "kernels/instruction_set.hpp"
#include "trainer/options.hpp"

namespace shardtune {

// The warning for --bf16 or --fp16 on a processor that emulates it; empty when there is nothing to say.
std::string slow_precision_note(const TrainOptions& train, const HalfPrecision& processor);

// Prints it for this processor, on rank 0.
void warn_of_slow_precision(const TrainOptions& train);

}  // namespace shardtune
