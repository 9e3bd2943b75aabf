// Packed weights in bfloat16 (see panels.h) with the tiles of gemm.h: sums are float32, in order of the input rows.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "amx.h"
#include "panels.h"
#include "threads.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace {
#define VL 16
#define NV 4
#define MR 6
#include "simd.h"
#undef MR
#include "gemm.h"
}  // namespace

long half_panel_words(long in) { return inner_words(in); }

void pack_bfloat16(const Source& from, Panels& w) {
  const long count = inner_words(w.in);
  w.data = weight_buffer(w.panels() * count * NR * sizeof(uint32_t));
  const Matrix x{from.data, w.in, w.out, from.transposed ? w.in : w.out, from.transposed, false};
  parallel(w.panels(), [&](long p) { pack_panel(x, p * NR, (uint32_t*)w.data.get() + p * count * NR); });
}

Inputs prepare_bfloat16(const Panels& w, const float* x, long rows, InputRoom& room) {
  const Matrix of_x{x, rows, w.in, w.in, false, false};
  const long stride = row_stride(inner_words(w.in));
  uint32_t* to = room.words.get<uint32_t>(up(rows, 16) * stride);
  if (rows <= 16) pack_rows(of_x, 0, rows, to, stride);
  else pack_all(of_x, to, stride);
  Inputs in;
  in.rows = rows, in.stride = stride, in.words = to;
  return in;
}

void sums_bfloat16(const Panels& w, const Inputs& x, long m0, long m1, long panel, float* c, long ldc) {
  const long count = inner_words(w.in), rows = m1 - m0;
  const uint32_t *a = x.words + m0 * x.stride, *b = (const uint32_t*)w.data.get() + panel * count * NR;
  if (amx_bf16_ready()) return amx_bf16_tiles(rows, count, a, x.stride, b, c, ldc, NR, false);
  const long depth = rows > MR ? 64 : count;  // 64 words of a panel (16 KB) stay in the first-level cache
  for (long k = 0; k < count; k += depth) {
    const long part = std::min(depth, count - k);
    for (long m = 0; m < rows; m += MR) {
      // Few rows are bound by reading B and ask for 4 KB ahead; else the second tile fetches the next part.
      const long ahead = rows <= MR ? 16 * NR : m == MR ? depth * NR : 0;
      const auto run = [&](auto tile) {
        tile(part, a + m * x.stride + k, x.stride, b + k * NR, c + m * ldc, ldc, NR, k > 0, ahead);
      };
      if (rows - m >= MR) run(half_tile<MR, 4>);
      else if (rows - m == 5) run(half_tile<5, 4>);
      else if (rows - m == 4) run(half_tile<4, 4>);
      else if (rows - m == 3) run(half_tile<3, 4>);
      else if (rows - m == 2) run(half_tile<2, 4>);
      else run(half_tile<1, 4>);
    }
  }
}
#pragma GCC pop_options
