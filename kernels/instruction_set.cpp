#include "kernels/instruction_set.hpp"

#include <cstdlib>
#include <string_view>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#include <fmt/format.h>

#include "core/error.hpp"

namespace shardtune {

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return InstructionSet::avx512;
  if (__builtin_cpu_supports("avx2")) return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

InstructionSet choose_instruction_set(const char* requested) {
  if (requested == nullptr) return best_instruction_set();
  constexpr std::pair<std::string_view, InstructionSet> kNames[] = {
      {"avx512", InstructionSet::avx512}, {"avx2", InstructionSet::avx2}, {"portable", InstructionSet::portable}};
  for (const auto& [name, set] : kNames) {
    if (requested != name) continue;
    if (set > best_instruction_set())
      fail(ErrorKind::config, fmt::format("SHARDTUNE_ISA is '{}', which this processor lacks; unset it", requested));
    return set;
  }
  fail(ErrorKind::config,
       fmt::format("SHARDTUNE_ISA is '{}'; known are avx512, avx2 and portable; unset it for the best one", requested));
}

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose_instruction_set(std::getenv("SHARDTUNE_ISA"));
  return chosen;
}

HalfPrecision half_precision() {
  HalfPrecision has;
#if defined(__x86_64__)
  // AVX-512 needs the operating system as well, which __builtin_cpu_supports asks; it does not know these two under
  // every compiler. Processors with AMX have them too.
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_supports("avx512f")) return has;
  if (__get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) != 0) has.has_bf16 = (eax >> 5 & 1U) != 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) != 0) has.has_fp16 = (edx >> 23 & 1U) != 0;
#endif
  return has;
}

}  // namespace shardtune
