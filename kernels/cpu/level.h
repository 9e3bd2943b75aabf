// The widest instruction set of this processor: 2 AVX-512, 1 AVX2 with FMA, 0 what every x86-64 has.
#pragma once

static inline int level() {
  static const int found = __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 2
                           : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")                                              ? 1
                                                                                                                                          : 0;
  return found;
}
