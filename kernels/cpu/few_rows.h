// A few rows times a matrix that is read once; see few_rows.cc. Included once per instruction set after simd.h.

typedef unsigned short vh __attribute__((vector_size(VL * 2)));

constexpr long DEPTH = 64;  // input rows of the weight per step, each one stream of memory

static INLINE vf weights(const float* p) { return load(p); }
static INLINE vf weights(const uint16_t* p) {  // bfloat16: the upper half of a float
  vh x;
  std::memcpy(&x, p, sizeof(x));
  return (vf)(__builtin_convertvector(x, vi) << 16);
}

// y[m, c] (+)= sum over k of x[k, m] w[k, c] for M rows and N vectors of columns; x column-major (k, ldx).
template <int M, int N, class T>
static INLINE void few_tile(long depth, const float* x, long ldx, const T* w, long ldw, float* y, long ldy, bool add) {
  vf c[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) c[m][n] = add ? load(y + m * ldy + n * VL) : vf{};
  for (long k = 0; k < depth; k++) {
    vf b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      b[n] = weights(w + k * ldw + n * VL);
      __builtin_prefetch(w + k * ldw + (N + n) * VL);  // the tile to the right
    }
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const vf a = splat(x[k * ldx + m]);
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) c[m][n] += a * b[n];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(y + m * ldy + n * VL, c[m][n]);
}

template <int N, class T>
static INLINE void few_rows_of(long rows, long depth, const float* x, long ldx, const T* w, long ldw, float* y,
                               long ldy, bool add) {
  constexpr int FULL = 2 * MR - 4;  // 8 rows with 32 registers, 4 with 16
  long m = 0;
  for (; m + FULL <= rows; m += FULL) few_tile<FULL, N>(depth, x + m, ldx, w, ldw, y + m * ldy, ldy, add);
  for (; m + 4 <= rows; m += 4) few_tile<4, N>(depth, x + m, ldx, w, ldw, y + m * ldy, ldy, add);
  if (rows - m == 3) few_tile<3, N>(depth, x + m, ldx, w, ldw, y + m * ldy, ldy, add);
  if (rows - m == 2) few_tile<2, N>(depth, x + m, ldx, w, ldw, y + m * ldy, ldy, add);
  if (rows - m == 1) few_tile<1, N>(depth, x + m, ldx, w, ldw, y + m * ldy, ldy, add);
}

// Columns [from, to) of y (rows, out); x column-major (in, rows).
template <class T>
static void few_columns(const Few& f, const T* w, const float* x, long from, long to, float* y) {
  constexpr int N = VL == 16 ? 3 : 2;
  for (long k = 0; k < f.in; k += DEPTH) {
    const long depth = std::min(DEPTH, f.in - k);
    const T* at = w + k * f.out;
    const float* part = x + k * f.rows;
    long c = from;
    for (; c + N * VL <= to; c += N * VL)
      few_rows_of<N>(f.rows, depth, part, f.rows, at + c, f.out, y + c, f.out, k > 0);
    for (; c + VL <= to; c += VL) few_rows_of<1>(f.rows, depth, part, f.rows, at + c, f.out, y + c, f.out, k > 0);
    for (; c < to; c++)
      for (long m = 0; m < f.rows; m++) {
        float sum = k ? y[m * f.out + c] : 0.0f;
        for (long i = 0; i < depth; i++) sum += part[i * f.rows + m] * as_float(at[i * f.out + c]);
        y[m * f.out + c] = sum;
      }
  }
  if (f.bias)
    for (long m = 0; m < f.rows; m++)
      for (long c = from; c < to; c++) y[m * f.out + c] += f.bias[c];
}
static void few_float(const Few& f, const void* w, const float* x, long from, long to, float* y) {
  few_columns(f, (const float*)w, x, from, to, y);
}
static void few_bfloat16(const Few& f, const void* w, const float* x, long from, long to, float* y) {
  few_columns(f, (const uint16_t*)w, x, from, to, y);
}
