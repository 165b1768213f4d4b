#include "kernels/instruction_set.hpp"

#include <cstdlib>
#include <string>
#include <string_view>
#include <utility>

#if defined(__x86_64__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#include <fmt/format.h>

#include "core/error.hpp"

namespace shardtune {
namespace {

constexpr std::pair<std::string_view, InstructionSet> kNames[] = {{"portable", InstructionSet::portable},
                                                                  {"avx2", InstructionSet::avx2},
                                                                  {"avx512", InstructionSet::avx512},
                                                                  {"avx512_bf16", InstructionSet::avx512_bf16},
                                                                  {"amx", InstructionSet::amx}};

#if defined(__x86_64__)
// Tiles need the operating system's permission, which a process asks for once and its threads inherit.
bool may_use_tiles() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) == 0) return false;
  const bool has_bf16_tiles = (edx >> 22 & 1U) != 0 && (edx >> 24 & 1U) != 0;
  return has_bf16_tiles && ::syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

}  // namespace

InstructionSet best_instruction_set() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
    if (!half_precision().has_bf16) return InstructionSet::avx512;
    static const bool has_tiles = may_use_tiles();
    return has_tiles ? InstructionSet::amx : InstructionSet::avx512_bf16;
  }
  if (__builtin_cpu_supports("avx2")) return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

InstructionSet choose_instruction_set(const char* requested) {
  if (requested == nullptr) return best_instruction_set();
  for (const auto& [name, set] : kNames) {
    if (requested != name) continue;
    if (set > best_instruction_set())
      fail(ErrorKind::config, fmt::format("SHARDTUNE_ISA is '{}', which this processor lacks; unset it", requested));
    return set;
  }
  std::string known;
  for (const auto& [name, set] : kNames) known += (known.empty() ? "" : ", ") + std::string(name);
  fail(ErrorKind::config,
       fmt::format("SHARDTUNE_ISA is '{}'; known are {}; unset it for the best one", requested, known));
}

InstructionSet instruction_set() {
  static const InstructionSet chosen = choose_instruction_set(std::getenv("SHARDTUNE_ISA"));
  return chosen;
}

const char* name_of(InstructionSet set) { return kNames[static_cast<std::size_t>(set)].first.data(); }

bool is_intel_processor() {
#if defined(__x86_64__)
  return __builtin_cpu_is("intel") != 0;
#else
  return false;
#endif
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
