#pragma once
// Which vector instructions the kernels of this folder use (ATen's own are not concerned), and which 16-bit arithmetic
// there is. Thread-safe.

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

// Whether this processor has arithmetic of its own for a 16-bit type. Where it has not, matrix products of that type
// are emulated, several times slower than in fp32.
struct HalfPrecision {
  bool has_bf16 = false, has_fp16 = false;
};
HalfPrecision half_precision();

}  // namespace shardtune
