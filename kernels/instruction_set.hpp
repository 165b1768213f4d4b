#pragma once
// Which vector instructions the kernels of this folder use (ATen's own are not concerned), and which 16-bit arithmetic
// there is. Thread-safe.

namespace shardtune {

// Each contains the ones before it. avx512_bf16: products of bf16 pairs; amx: those of bf16 tiles.
enum class InstructionSet { portable, avx2, avx512, avx512_bf16, amx };

// What this processor can do. Asks Linux for the use of AMX tiles where there are any.
InstructionSet best_instruction_set();
// nullptr: the best one; else the one named (as the enumerators are). Error{config} for another name and for one that
// this processor lacks.
InstructionSet choose_instruction_set(const char* requested);
// The choice of this process, made at the first call from the environment variable SHARDTUNE_ISA. It is there to test
// and to debug: the bits are the same under every choice, except for what has products of its own: bf16 attention,
// linear layers and heads under avx512_bf16 and amx; fp32 linear layers and heads, and what blocked_attention.hpp
// takes, from avx512 on where the processor is not Intel's (fp32_gemm.hpp).
InstructionSet instruction_set();
const char* name_of(InstructionSet set);

// Raised whenever an operator's bits change on any processor: a run that goes on with other kernels is told so.
inline constexpr int kKernelRevision = 3;

// Intel's own libraries take their best instructions on Intel's processors alone.
bool is_intel_processor();

// Whether this processor has arithmetic of its own for a 16-bit type. Where it has not, matrix products of that type
// are emulated, several times slower than in fp32.
struct HalfPrecision {
  bool has_bf16 = false, has_fp16 = false;
};
HalfPrecision half_precision();

}  // namespace shardtune
