// The products of attention's tiles in float32; included once per instruction set after simd.h. See attention.h.

typedef float word;
constexpr long BR = 72, BC = 64;      // queries and keys of a tile; scores (18 KB) and operands fit in the L1 cache
constexpr bool LEFT_IS_RIGHT = true;  // rows packed as left operand serve as right operand too

static INLINE long padded(long Dh) { return (Dh + VL - 1) / VL * VL; }
static INLINE long left_width(long Dh) { return padded(Dh); }               // words of a row of a left operand
static INLINE long transposed_words(long Dh) { return padded(Dh) * BC; }    // of a block of keys for scores
static INLINE long right_words(long n, long Dh) { return n * padded(Dh); }  // of n rows as a right operand

static INLINE vf as_operand(vf x) { return x; }

// Rows (n, Dp); zeros where padded.
static void pack_left(const float* x, long n, long stride, long Dh, float* out) {
  const long Dp = padded(Dh);
  for (long t = 0; t < n; t++) {
    std::memcpy(out + t * Dp, x + t * stride, Dh * sizeof(float));
    for (long d = Dh; d < Dp; d++) out[t * Dp + d] = 0;
  }
}
static void pack_right(const float* x, long n, long stride, long Dh, float* out) { pack_left(x, n, stride, Dh, out); }
// Transposed: (Dp, BC).
static void pack_transposed(const float* x, long n, long stride, long Dh, float* out) {
  std::memset(out, 0, transposed_words(Dh) * sizeof(float));
  for (long d = 0; d < Dh; d++)
    for (long j = 0; j < n; j++) out[d * BC + j] = x[j * stride + d];
}

// S (M, BC) = left rows times a block packed by pack_transposed.
static void multiply_transposed(long M, long Dh, const float* left, const float* block, float* S) {
  small_gemm(M, BC, Dh, left, padded(Dh), 1, block, BC, S, BC, false);
}
// C (M, Dp) += S (M, n) times n rows packed by pack_right.
static void mix(long M, long n, long Dh, const float* S, const float* right, float* C) {
  small_gemm(M, padded(Dh), n, S, BC, 1, right, padded(Dh), C, padded(Dh), true);
}
// C (n, Dp) += S^T, of S (M, n), times M rows packed by pack_right.
static void mix_transposed(long M, long n, long Dh, const float* S, const float* right, float* C) {
  small_gemm(n, padded(Dh), M, S, 1, BC, right, padded(Dh), C, padded(Dh), true);
}

#include "attention.h"
