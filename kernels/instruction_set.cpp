#include "kernels/instruction_set.hpp"

#include <cstdlib>
#include <string_view>
#include <utility>

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

}  // namespace shardtune
