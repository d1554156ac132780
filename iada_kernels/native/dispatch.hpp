// Which instruction set serves: the best of those compiled that this processor has, or the one
// that the environment variable IADA_INSTRUCTION_SET names (portable, avx2, avx512), if it has it.

#pragma once

#include <cstdlib>
#include <cstring>

#include "passes.hpp"
#include "threads.hpp"

namespace iada {

enum class InstructionSet { portable, avx2, avx512 };

inline InstructionSet choose_instruction_set() {
  [[maybe_unused]] const char* wish = std::getenv("IADA_INSTRUCTION_SET");
#ifdef IADA_X86_SETS
  const bool any = wish == nullptr || *wish == 0;
  const auto may = [&](const char* name) { return any || std::strcmp(wish, name) == 0; };
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                    __builtin_cpu_supports("bmi2");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") &&
                      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512cd") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (avx512 && may("avx512")) return InstructionSet::avx512;
  if (avx2 && may("avx2")) return InstructionSet::avx2;
#endif
  return InstructionSet::portable;
}

inline InstructionSet instruction_set() {
  static const InstructionSet set = choose_instruction_set();
  return set;
}

inline const char* instruction_set_name() {
  switch (instruction_set()) {
    case InstructionSet::avx512: return "avx512";
    case InstructionSet::avx2: return "avx2";
    default: return "portable";
  }
}

#ifdef IADA_X86_SETS
#define IADA_DISPATCH(pass, Record)                                              \
  template <class T>                                                             \
  inline void run(const Record<T>& record) {                                     \
    switch (instruction_set()) {                                                 \
      case InstructionSet::avx512: return avx512::pass(record);                  \
      case InstructionSet::avx2: return avx2::pass(record);                      \
      default: return portable::pass(record);                                    \
    }                                                                            \
  }
#else
#define IADA_DISPATCH(pass, Record)          \
  template <class T>                         \
  inline void run(const Record<T>& record) { \
    portable::pass(record);                  \
  }
#endif

inline void run(const AllFinite& record) {
#ifdef IADA_X86_SETS
  if (instruction_set() == InstructionSet::avx512) return avx512::all_finite(record);
  if (instruction_set() == InstructionSet::avx2) return avx2::all_finite(record);
#endif
  portable::all_finite(record);
}

IADA_DISPATCH(class_pass, ClassPass)
IADA_DISPATCH(table_backward, TableBackward)
IADA_DISPATCH(grad_covariance, GradCovariance)
IADA_DISPATCH(class_sums, ClassSums)
IADA_DISPATCH(head, Head)
IADA_DISPATCH(grad_features, GradFeatures)
IADA_DISPATCH(covariance_update, CovarianceUpdate)
IADA_DISPATCH(covariance_step, CovarianceStep)
IADA_DISPATCH(tangent_head, TangentHead)
IADA_DISPATCH(characteristics, Characteristics)

}  // namespace iada
