// y = x W + b with x rounded to int8 by rows and W in int8 by columns (scheme a8w8 of kernels.quant_linear); sums are
// exact.
//
// W is read as stored, (in, out), and interleaved on the way: per task and a few hundred input rows, into panels of 64
// columns of words, each with four codes of consecutive k (two, as int16, before VNNI). For a few rows of x this takes
// as long as reading W from the first-level cache, so no packed copy is stored. The products use the best of
//   4  AMX-int8: signed x signed;
//   3  AVX512-VNNI, unsigned x signed: with w + 128 for w, and 128 times the sum of the row's codes taken off again;
//   2, 1, 0  pmaddwd of AVX-512, AVX2, SSE2: pairs of int16.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "amx.h"
#include "threads.h"

namespace int8 {
// Per task: rows; panels (many are read together if there are few rows, because then reads of W's rows are long); the
// maximum of sums, and of panels times words, in memory. AHEAD: how many rows of W ahead are prefetched.
constexpr long HEIGHT = 192, WIDTH = 32, SUMS = 1 << 16, PACKED = 512, AHEAD = 4;
}  // namespace int8

#define BODY "int8_rows.h"
#include "every_isa.h"

struct Int8Linear {
  long rows, in, out;
  const float* x;              // (rows, in)
  const signed char* w;        // (in, out)
  const float *scales, *bias;  // (out), bias may be null
  const float* input_scale;    // for all of x; null: max |row| / 127 per row
  float* y;                    // (rows, out)
};

namespace int8 {
static inline int best(long rows) {
  static const bool vnni = level() == 2 && __builtin_cpu_supports("avx512vnni");
  return vnni && rows >= 16 && amx_int8_ready() ? 4 : vnni ? 3 : level();  // few rows would leave tiles mostly empty
}

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
// Rows row … row + 3 of w, columns c … c + 63 -> to[n]; each byte xor `flip`; zeros (flipped) past in and out.
static INLINE void pack_quad(const signed char* w, long in, long out, long row, long c, char flip, uint32_t* to) {
  const __mmask64 keep = out - c < 64 ? (1ull << (out - c)) - 1 : ~0ull;
  const __m512i flips = _mm512_set1_epi8(flip);
  // Four columns of lane l and index i come from 16 i + 4 l, so that the unpacking below restores the order.
  const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
  __m512i r[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    r[i] = _mm512_permutexvar_epi32(
        order, _mm512_xor_si512(flips, _mm512_maskz_loadu_epi8(row + i < in ? keep : 0, w + (row + i) * out + c)));
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
    __builtin_prefetch(w + (row + i + AHEAD) * out + c);  // the hardware prefetcher stops at a page's end
  const __m512i low = _mm512_unpacklo_epi8(r[0], r[1]), high = _mm512_unpackhi_epi8(r[0], r[1]);
  const __m512i low2 = _mm512_unpacklo_epi8(r[2], r[3]), high2 = _mm512_unpackhi_epi8(r[2], r[3]);
  _mm512_store_si512(to, _mm512_unpacklo_epi16(low, low2));
  _mm512_store_si512(to + 16, _mm512_unpackhi_epi16(low, low2));
  _mm512_store_si512(to + 32, _mm512_unpacklo_epi16(high, high2));
  _mm512_store_si512(to + 48, _mm512_unpackhi_epi16(high, high2));
}
// The same for `words` rows of words and `columns` columns, one panel every `panel` words.
static void pack_quads(const signed char* w, long in, long out, long row, long words, long c, long columns, char flip,
                       uint32_t* to, long panel) {
  for (long q = 0; q < words; q++)
    for (long n = 0; n < columns; n += 64)
      pack_quad(w, in, out, row + 4 * q, c + n, flip, to + n / 64 * panel + q * 64);
}

// FLIP: B is signed, and its codes plus 128 are multiplied.
template <int M, bool FLIP>
static void quad_tile(long words, const uint32_t* A, long a_stride, const uint32_t* B, int32_t* C, long ldc, bool add,
                      long ahead) {
  __m512i c[M][4];
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) c[m][n] = add ? _mm512_loadu_si512(C + m * ldc + 16 * n) : _mm512_setzero_si512();
  for (long q = 0; q < words; q++) {
    __m512i b[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) {
      b[n] = _mm512_load_si512(B + q * 64 + 16 * n);
      if (ahead) __builtin_prefetch(B + q * 64 + 16 * n + ahead);
      if (FLIP) b[n] = _mm512_xor_si512(b[n], _mm512_set1_epi8((char)0x80));
    }
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const __m512i a = _mm512_set1_epi32((int)A[m * a_stride + q]);
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) c[m][n] = _mm512_dpbusd_epi32(c[m][n], b[n], a);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) _mm512_storeu_si512(C + m * ldc + 16 * n, c[m][n]);
}
// ahead: how many words ahead in B the second tile fetches, after the first has waited for its own; 0: none. Up to six
// rows are bound by reading B and ask for 4 KB ahead.
template <bool FLIP = false>
static void quad_tiles(long M, long words, const uint32_t* A, long a_stride, const uint32_t* B, int32_t* C, long ldc,
                       bool add, long ahead = 0) {
  for (long m = 0; m < M; m += 6, A += 6 * a_stride, C += 6 * ldc) {
    const long fetch = !ahead ? 0 : M <= 6 ? 16 * 64 : m == 6 ? ahead : 0;
    const auto run = [&](auto tile) { tile(words, A, a_stride, B, C, ldc, add, fetch); };
    if (M - m >= 6) run(quad_tile<6, FLIP>);
    else if (M - m == 5) run(quad_tile<5, FLIP>);
    else if (M - m == 4) run(quad_tile<4, FLIP>);
    else if (M - m == 3) run(quad_tile<3, FLIP>);
    else if (M - m == 2) run(quad_tile<2, FLIP>);
    else run(quad_tile<1, FLIP>);
  }
}
#pragma GCC pop_options

// x as words of codes, row by row, with the factor and the offset of each row's sums.
struct Codes {
  long words, stride;  // words of a row, and from one row to the next (a multiple of 16)
  std::unique_ptr<uint32_t, void (*)(void*)> codes;
  std::unique_ptr<float[]> scale;
  std::unique_ptr<int[]> less;
  Codes(const Int8Linear& p, int how)
      : words(how > 2 ? (p.in + 3) / 4 : (p.in + 1) / 2),
        stride((words + 15) / 16 * 16),
        codes((uint32_t*)std::aligned_alloc(64, p.rows * stride * 4), std::free),
        scale(new float[p.rows]),
        less(new int[p.rows]) {
    constexpr long ROWS = 16;
    parallel((p.rows + ROWS - 1) / ROWS, [&](long t) {
      for (long m = t * ROWS; m < std::min(p.rows, (t + 1) * ROWS); m++) {
        uint32_t* to = codes.get() + m * stride;
        int sum;
        scale[m] = how > 2 ? wide::round_to_int8(p.x + m * p.in, p.in, stride * 4, p.input_scale, to, &sum)
                           : PICK(how, round_to_int16)(p.x + m * p.in, p.in, stride * 2, p.input_scale, to, &sum);
        less[m] = how == 3 ? 128 * sum : 0;
      }
    });
  }
};

static void linear(const Int8Linear& p, int how) {
  if (p.rows < 1 || p.out < 1) return;
  const Codes x(p, how);
  const long panels = (p.out + 63) / 64, share = (panels + threads() - 1) / threads();
  const long most = std::max(1L, std::min({share, WIDTH, SUMS / 64 / std::min(p.rows, HEIGHT)})), width = most * 64;
  const long across = (panels + most - 1) / most, down = (p.rows + HEIGHT - 1) / HEIGHT,
             depth = std::min(64L, PACKED / most / 16 * 16);
  parallel(across * down, [&](long task) {
    alignas(64) uint32_t B[PACKED * 64];
    alignas(64) int32_t C[SUMS];
    const long c0 = task % across * width, m0 = task / across * HEIGHT, height = std::min(HEIGHT, p.rows - m0);
    const long columns = std::min(width, p.out - c0), panel = depth * 64;
    for (long w = 0; w < x.words; w += depth) {
      const long words = std::min(depth, x.words - w);
      const uint32_t* A = x.codes.get() + m0 * x.stride + w;
      if (how > 2) pack_quads(p.w, p.in, p.out, 4 * w, words, c0, columns, how == 3 ? (char)0x80 : 0, B, panel);
      else PICK(how, pack_pairs)(p.w, p.in, p.out, 2 * w, words, c0, columns, B, panel);
      for (long c = 0; c < columns; c += 64) {
        const uint32_t* b = B + c / 64 * panel;
        if (how == 4) amx_int8_tiles(height, words, A, x.stride, b, C + c, width, 64, w > 0);
        else if (how == 3) quad_tiles(height, words, A, x.stride, b, C + c, width, w > 0);
        else PICK(how, pair_tiles)(height, words, A, x.stride, b, C + c, width, w > 0);
      }
    }
    for (long m = 0; m < height; m++)
      PICK(std::min(how, 2), finish_row)(C + m * width, x.less[m0 + m], x.scale[m0 + m], p.scales + c0,
                                         p.bias ? p.bias + c0 : nullptr, columns, p.y + (m0 + m) * p.out + c0);
  });
}
}  // namespace int8
