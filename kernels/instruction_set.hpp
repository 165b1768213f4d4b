#pragma once
// Which vector instructions the kernels of this folder use; ATen's own kernels are not concerned. Thread-safe.

namespace shardtune {

enum class InstructionSet { portable, avx2, avx512 };  // each contains the ones before it

// What this processor can do.
InstructionSet best_instruction_set();
// nullptr: the best one; else the one named (avx512, avx2, portable). Error{config} for another name and for one that
// this processor lacks.
InstructionSet choose_instruction_set(const char* requested);
// The choice of this process, made at the first call from the environment variable SHARDTUNE_ISA. It is there to test
// and to debug: the bits are the same under every choice.
InstructionSet instruction_set();

}  // namespace shardtune
