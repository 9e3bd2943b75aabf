// Rows of codes, their products in pairs of int16 (pmaddwd, exact), and scaling of the sums; see int8.h. Included once
// per instruction set after simd.h.

typedef signed char vb __attribute__((vector_size(VL)));
typedef short vh __attribute__((vector_size(VL * 2)));
typedef int vi_u __attribute__((vector_size(VL * 4), aligned(4), may_alias));

// x (n) -> codes, int8 or int16, zeros past n up to `width`; returns the scale of a code and the sum of the codes.
template <class Code>
static float round_row(const float* x, long n, long width, const float* given, Code* codes, int* sum) {
  typedef Code vc __attribute__((vector_size(VL * sizeof(Code))));
  const vi magnitude = vi{} + 0x7FFFFFFF;
  vf best = {};
  vi strange = {};
  long i = 0;
  for (; i + VL <= n; i += VL) {
    const vf v = load(x + i);
    best = vmax((vf)((vi)v & magnitude), best);
    strange |= v != v;
  }
  float largest = hmax(best);
  bool nan = false;
  for (int lane = 0; lane < VL; lane++) nan |= strange[lane] != 0;
  for (long j = i; j < n; j++) largest = std::max(largest, std::fabs(x[j])), nan |= x[j] != x[j];
  const float scale = given ? *given : std::max(largest, 1e-8f) / 127.0f;
  constexpr float BIG = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, half to even, in the low bits
  vi total = {};
  for (i = 0; i + VL <= n; i += VL) {
    vf v = vmax(load(x + i) / scale, splat(-128.0f));
    v = v < 127.0f ? v : splat(127.0f);
    const vi code = (vi)(v + BIG) - 0x4B400000;
    const vc narrow = __builtin_convertvector(code, vc);
    std::memcpy(codes + i, &narrow, sizeof(vc));
    total += code;
  }
  *sum = 0;
  for (int lane = 0; lane < VL; lane++) *sum += total[lane];
  for (; i < n; i++) {
    codes[i] = (Code)(std::min(std::max(x[i] / scale, -128.0f), 127.0f) + BIG - BIG);
    *sum += codes[i];
  }
  std::fill(codes + n, codes + width, Code(0));
  return nan || (!given && largest > 3.4028235e38f) ? std::nanf("") : scale;
}

static float round_to_int8(const float* x, long n, long width, const float* given, void* codes, int* sum) {
  return round_row(x, n, width, given, (signed char*)codes, sum);
}
static float round_to_int16(const float* x, long n, long width, const float* given, void* codes, int* sum) {
  return round_row(x, n, width, given, (short*)codes, sum);
}

// Rows row, row + 1 of w (in, out), columns c … c + 63 -> to[n]; zeros past in and out.
static INLINE void pack_pair(const signed char* w, long in, long out, long row, long c, uint32_t* to) {
  const long left = std::min(64L, out - c);
  const signed char* at[2] = {w + row * out + c, w + (row + 1) * out + c};
  signed char edge[2][64];
  if (left < 64 || row + 1 >= in)
    for (int i = 0; i < 2; i++) {
      std::memset(edge[i], 0, 64);
      if (row + i < in) std::memcpy(edge[i], at[i], left);
      at[i] = edge[i];
    }
  for (int i = 0; i < 2; i++) __builtin_prefetch(w + (row + i + int8::AHEAD) * out + c);
  for (long n = 0; n < 64; n += VL) {
    vb low, high;
    std::memcpy(&low, at[0] + n, VL);
    std::memcpy(&high, at[1] + n, VL);
    *(vi_u*)(to + n) = (__builtin_convertvector(low, vi) & 0xFFFF) | (__builtin_convertvector(high, vi) << 16);
  }
}
// The same for `words` pairs of rows and `columns` columns, one panel every `panel` words.
static void pack_pairs(const signed char* w, long in, long out, long row, long words, long c, long columns,
                       uint32_t* to, long panel) {
  for (long p = 0; p < words; p++)
    for (long n = 0; n < columns; n += 64) pack_pair(w, in, out, row + 2 * p, c + n, to + n / 64 * panel + p * 64);
}

static INLINE vi madd(vi a, vi b) {
#if VL == 16
  return (vi)_mm512_madd_epi16((__m512i)a, (__m512i)b);
#elif VL == 8
  return (vi)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#else
  return (vi)_mm_madd_epi16((__m128i)a, (__m128i)b);
#endif
}

template <int M, int N>
static INLINE void pair_tile(long words, const uint32_t* A, long a_stride, const uint32_t* B, int32_t* C, long ldc,
                             bool add) {
  vi c[M][N];
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) c[m][n] = add ? *(const vi_u*)(C + m * ldc + n * VL) : vi{};
  for (long p = 0; p < words; p++) {
    vi b[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) b[n] = *(const vi_u*)(B + p * 64 + n * VL);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const vi a = vi{} + (int)A[m * a_stride + p];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) c[m][n] += madd(b[n], a);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) *(vi_u*)(C + m * ldc + n * VL) = c[m][n];
}

static void pair_tiles(long M, long words, const uint32_t* A, long a_stride, const uint32_t* B, int32_t* C, long ldc,
                       bool add) {
  for (long n = 0; n < 64; n += NV * VL) {
    long m = 0;
    for (; m + MR <= M; m += MR) pair_tile<MR, NV>(words, A + m * a_stride, a_stride, B + n, C + m * ldc + n, ldc, add);
    for (; m < M; m++) pair_tile<1, NV>(words, A + m * a_stride, a_stride, B + n, C + m * ldc + n, ldc, add);
  }
}

// y = (sums - offset) * row_scale * scales + bias
static void finish_row(const int32_t* sums, int offset, float row_scale, const float* scales, const float* bias, long n,
                       float* y) {
  long c = 0;
  for (; c + VL <= n; c += VL) {
    const vf value = __builtin_convertvector(*(const vi_u*)(sums + c) - offset, vf) * row_scale * load(scales + c);
    store(y + c, bias ? value + load(bias + c) : value);
  }
  for (; c < n; c++) y[c] = (float)(sums[c] - offset) * row_scale * scales[c] + (bias ? bias[c] : 0.0f);
}
