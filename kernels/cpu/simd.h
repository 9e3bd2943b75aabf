// Vectors of VL floats and a small matrix product; included once per instruction set, inside its namespace.
//
// GCC's vector extensions, not intrinsics: one source becomes AVX-512, AVX2 or SSE2 code under `#pragma GCC target`.
// Define before including: VL (floats of a vector), NV (vectors of a tile's row), MR (rows of a tile). There is no
// include guard.

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int vi __attribute__((vector_size(VL * 4)));
typedef float vf_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));

#define INLINE inline __attribute__((always_inline))

static INLINE vf load(const float* p) { return *(const vf_u*)p; }
static INLINE void store(float* p, vf x) { *(vf_u*)p = x; }
static INLINE vf load_part(const float* p, long n) {  // the first n < VL floats, zeros after them
  vf x = {};
  std::memcpy(&x, p, n * sizeof(float));
  return x;
}
static INLINE vf splat(float x) { return x - vf{}; }
static INLINE vf vmax(vf a, vf b) { return a > b ? a : b; }

template <class F>
static INLINE float fold(vf x, F f) {
  alignas(VL * 4) float a[VL];
  store(a, x);
  for (int w = VL / 2; w; w /= 2)
    for (int i = 0; i < w; i++) a[i] = f(a[i], a[i + w]);
  return a[0];
}
static INLINE float hsum(vf x) {
  return fold(x, [](float a, float b) { return a + b; });
}
static INLINE float hmax(vf x) {
  return fold(x, [](float a, float b) { return a > b ? a : b; });
}

// exp(x) for x <= 88, 0 below -87: 2^n * p(r) with r = x - n ln 2 in [-ln2/2, ln2/2]; relative error under 2e-7.
static INLINE vf vexp(vf x) {
  const vf low = splat(-87.0f);
  const vi keep = x > low;
  x = vmax(x, low);
  const vf t = x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the integer part lands in the low bits
  const vf n = t - 12582912.0f;
  vf r = x - n * 0.693359375f;
  r = r + n * 2.12194440e-4f;
  vf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  const vi bits = ((vi)t - 0x4B400000 + 127) << 23;
  return (vf)((vi)(p * (vf)bits) & keep);
}

// tanh(x) with relative error 2e-7; NaN stays NaN. Near 0 an odd polynomial, because 1 - 2 / (1 + e^2x) would cancel.
static INLINE vf vtanh(vf x) {
  const vf u = x < 0 ? -x : x, z = x * x, e = vexp(-2.0f * u), far = (1.0f - e) / (1.0f + e);
  vf p = splat(-5.70498872745e-3f);
  p = p * z + 2.06390887954e-2f;
  p = p * z - 5.37397155531e-2f;
  p = p * z + 1.33314422036e-1f;
  p = p * z - 3.33332819422e-1f;
  return u >= 0.625f ? (x < 0 ? -far : far) : p * z * x + x;
}

// C[m, n] (+)= sum_k A[m, k] B[k, n]; A by strides, B and C by rows; n is a multiple of VL. Sums in order of k.
template <int M, int N>
static INLINE void tile(long K, const float* A, long ars, long acs, const float* B, long ldb, float* C, long ldc,
                        bool add) {
  vf c[M][N];
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) c[m][n] = add ? load(C + m * ldc + n * VL) : vf{};
  for (long k = 0; k < K; k++) {
    vf b[N];
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) b[n] = load(B + k * ldb + n * VL);
#pragma GCC unroll 16
    for (int m = 0; m < M; m++) {
      const vf a = splat(A[m * ars + k * acs]);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++) c[m][n] += a * b[n];
    }
  }
#pragma GCC unroll 16
  for (int m = 0; m < M; m++)
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) store(C + m * ldc + n * VL, c[m][n]);
}

template <int N, int FULL>
static void rows_of_tiles(long M, long K, const float* A, long ars, long acs, const float* B, long ldb, float* C,
                          long ldc, bool add) {
  long m = 0;
  for (; m + FULL <= M; m += FULL) tile<FULL, N>(K, A + m * ars, ars, acs, B, ldb, C + m * ldc, ldc, add);
  for (; m + 4 <= M; m += 4) tile<4, N>(K, A + m * ars, ars, acs, B, ldb, C + m * ldc, ldc, add);
  for (; m < M; m++) tile<1, N>(K, A + m * ars, ars, acs, B, ldb, C + m * ldc, ldc, add);
}

static void small_gemm(long M, long N, long K, const float* A, long ars, long acs, const float* B, long ldb, float* C,
                       long ldc, bool add) {
  long n = 0;
  for (; n + NV * VL <= N; n += NV * VL) rows_of_tiles<NV, MR>(M, K, A, ars, acs, B + n, ldb, C + n, ldc, add);
  if (NV > 2)
    for (; n + 2 * VL <= N; n += 2 * VL) rows_of_tiles<2, 2 * MR>(M, K, A, ars, acs, B + n, ldb, C + n, ldc, add);
  for (; n < N; n += VL) rows_of_tiles<1, 2 * MR>(M, K, A, ars, acs, B + n, ldb, C + n, ldc, add);
}
