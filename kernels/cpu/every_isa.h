// Includes simd.h and the file named by BODY once per instruction set, each in its own namespace, and defines PICK to
// call one of them: 2 AVX-512, 1 AVX2 with FMA, 0 baseline x86-64.

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
namespace wide {
#define VL 16
#define NV 4
#define MR 6
#include "simd.h"
#include BODY
#undef VL
#undef NV
#undef MR
}  // namespace wide
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("avx2,fma")
namespace middle {
#define VL 8
#define NV 2
#define MR 4
#include "simd.h"
#include BODY
#undef VL
#undef NV
#undef MR
}  // namespace middle
#pragma GCC pop_options

namespace narrow {
#define VL 4
#define NV 2
#define MR 4
#include "simd.h"
#include BODY
#undef VL
#undef NV
#undef MR
}  // namespace narrow

static inline int level() {
  static const int found =
      __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") ? 2
      : __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? 1
                                                                        : 0;
  return found;
}
static inline int level(int asked) { return asked < 0 ? level() : std::min(asked, level()); }  // -1: the best
#define PICK(at, function) ((at) == 2 ? wide::function : (at) == 1 ? middle::function : narrow::function)
