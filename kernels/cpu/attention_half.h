// The products of attention's tiles in bfloat16, sums in float32; included after gemm.h. See attention.h.

typedef uint32_t word;            // a pair of bfloat16
constexpr long BR = 96, BC = 64;  // queries and keys of a tile: multiples of 32, the step of the inner dimension
constexpr bool LEFT_IS_RIGHT = false;

static INLINE long padded(long Dh) { return (Dh + VL - 1) / VL * VL; }
static INLINE long left_width(long Dh) { return inner_words(Dh); }
static INLINE long transposed_words(long Dh) { return inner_words(Dh) * BC; }
static INLINE long right_words(long n, long Dh) { return inner_words(n) * up(Dh, NR); }

static INLINE vf as_operand(vf x) {
  return (vf)_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh((__m512)x)), 16));
}

static void pack_left(const float* x, long n, long stride, long Dh, word* out) {
  pack_rows(Matrix{x, n, Dh, stride, false, false}, 0, n, out, inner_words(Dh));
}
static void pack_right(const float* x, long n, long stride, long Dh, word* out) {
  for (long d = 0; d < Dh; d += NR) pack_panel(Matrix{x, n, Dh, stride, false, false}, d, out + inner_words(n) * d);
}
static void pack_transposed(const float* x, long n, long stride, long Dh, word* out) {
  pack_panel(Matrix{x, Dh, n, stride, true, false}, 0, out);
}

static void multiply_transposed(long M, long Dh, const word* left, const word* block, float* S) {
  tiles(M, inner_words(Dh), left, inner_words(Dh), block, S, BC, BC, false);
}
static void mix_rows(long M, long n, long Dh, const word* left, const word* right, float* C) {
  for (long d = 0; d < Dh; d += NR)
    tiles(M, inner_words(n), left, BC, right + inner_words(n) * d, C + d, padded(Dh), std::min(NR, Dh - d), true);
}
static void mix(long M, long n, long Dh, const float* S, const word* right, float* C) {
  alignas(64) word rows[BR * BC];
  pack_rows(Matrix{S, M, n, BC, false, false}, 0, M, rows, BC);
  mix_rows(M, n, Dh, rows, right, C);
}
static void mix_transposed(long M, long n, long Dh, const float* S, const word* right, float* C) {
  alignas(64) word rows[BR * BC];
  pack_rows(Matrix{S, n, M, BC, true, false}, 0, n, rows, BC);
  mix_rows(n, M, Dh, rows, right, C);
}

#include "attention.h"
