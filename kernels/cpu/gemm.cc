// Products of float32 matrices in bfloat16 with float32 sums (vdpbf16ps), packed and converted inside.
//
// C = op(A) op(B), each of A and B as it lies or transposed. Blocks of KC of the inner dimension are packed: B into panels of
// 64 columns of (k, k+1) pairs, A into rows of pairs (or, transposed, into columns). A tile of C is 6 x 64 in registers. Each
// tile of C is made by one thread, its sums in order of k: the same bits whatever the number of threads.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

#include "op.h"
#include "threads.h"

namespace {

constexpr long KC = 512, MC = 96, NC = 2048, NR = 64, MR = 6;

struct Free { void operator()(void* p) const { std::free(p); } };
using Buffer = std::unique_ptr<uint32_t, Free>;
Buffer buffer(size_t words) { return Buffer((uint32_t*)std::aligned_alloc(64, (words * 4 + 63) / 64 * 64)); }

}  // namespace

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace {

#define INLINE inline __attribute__((always_inline))

// 16 floats of row k and 16 of row k + 1 -> 16 pairs.
INLINE __m512i pairs(__m512 even, __m512 odd) {
  const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even)), b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}
INLINE __mmask16 first(long n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }

// Rows k of x (K, N), consecutive n contiguous -> out[k/2][n], `width` words a row; zeros past N and K.
void pack_interleaved(const float* x, long stride, long K, long N, uint32_t* out, long width) {
  for (long k = 0; k < K; k += 2)
    for (long n = 0; n < width; n += 16) {
      const __mmask16 keep = first(N - n);
      const float* at = x + k * stride + n;
      const __m512 even = _mm512_maskz_loadu_ps(keep, at), odd = _mm512_maskz_loadu_ps(k + 1 < K ? keep : 0, at + stride);
      _mm512_storeu_si512(out + k / 2 * width + n, pairs(even, odd));
    }
}

// Rows of x (rows, K), consecutive k contiguous -> out[row][k/2], `width` words a row; zeros past K.
void pack_rows(const float* x, long stride, long rows, long K, uint32_t* out, long width) {
  for (long r = 0; r < rows; r++)
    for (long k = 0; k < 2 * width; k += 32) {
      const float* at = x + r * stride + k;
      const __m512 low = _mm512_maskz_loadu_ps(first(K - k), at), high = _mm512_maskz_loadu_ps(first(K - k - 16), at + 16);
      _mm512_storeu_si512(out + r * width + k / 2, (__m512i)_mm512_cvtne2ps_pbh(high, low));
    }
}

void transpose16(const uint32_t* in, long in_stride, uint32_t* out, long out_stride) {
  __m512i a[16], b[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) a[i] = _mm512_loadu_si512(in + i * in_stride);
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]), b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]), a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]), a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88), b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    _mm512_storeu_si512(out + i * out_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88));
    _mm512_storeu_si512(out + (8 + i) * out_stride, _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd));
    _mm512_storeu_si512(out + (4 + i) * out_stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88));
    _mm512_storeu_si512(out + (12 + i) * out_stride, _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd));
  }
}

// A panel of NR columns of B where consecutive k are contiguous: x (N, K) -> out[k/2][NR].
void pack_panel_transposed(const float* x, long stride, long K, long N, uint32_t* out) {
  alignas(64) uint32_t rows[16 * 16];
  for (long n = 0; n < NR; n += 16)
    for (long k = 0; k < K; k += 32) {
      std::fill(rows, rows + 256, 0u);
      if (N > n) pack_rows(x + n * stride + k, stride, std::min(16L, N - n), K - k, rows, 16);
      if (k + 32 <= K) {
        transpose16(rows, 16, out + k / 2 * NR + n, NR);
      } else {
        alignas(64) uint32_t turned[16 * 16];
        transpose16(rows, 16, turned, 16);
        for (long p = 0; p < (K - k + 1) / 2; p++) std::copy(turned + p * 16, turned + p * 16 + 16, out + (k / 2 + p) * NR + n);
      }
    }
}

template <int M>
INLINE void tile(long pairs, const uint32_t* A, long am, long ak, const uint32_t* B, float* C, long ldc, long N, bool add) {
  __m512 c[M][4];
  const __mmask16 keep[4] = {first(N), first(N - 16), first(N - 32), first(N - 48)};
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) c[m][n] = add ? _mm512_maskz_loadu_ps(keep[n], C + m * ldc + 16 * n) : _mm512_setzero_ps();
  for (long p = 0; p < pairs; p++) {
    __m512bh b[4];
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) b[n] = (__m512bh)_mm512_load_si512(B + p * NR + 16 * n);
#pragma GCC unroll 6
    for (int m = 0; m < M; m++) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32((int)A[m * am + p * ak]);
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) c[m][n] = _mm512_dpbf16_ps(c[m][n], a, b[n]);
    }
  }
#pragma GCC unroll 6
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) _mm512_mask_storeu_ps(C + m * ldc + 16 * n, keep[n], c[m][n]);
}

void tiles(long M, long pairs, const uint32_t* A, long am, long ak, const uint32_t* B, float* C, long ldc, long N, bool add) {
  long m = 0;
  for (; m + MR <= M; m += MR) tile<MR>(pairs, A + m * am, am, ak, B, C + m * ldc, ldc, N, add);
  switch (M - m) {
    case 5: return tile<5>(pairs, A + m * am, am, ak, B, C + m * ldc, ldc, N, add);
    case 4: return tile<4>(pairs, A + m * am, am, ak, B, C + m * ldc, ldc, N, add);
    case 3: return tile<3>(pairs, A + m * am, am, ak, B, C + m * ldc, ldc, N, add);
    case 2: return tile<2>(pairs, A + m * am, am, ak, B, C + m * ldc, ldc, N, add);
    case 1: return tile<1>(pairs, A + m * am, am, ak, B, C + m * ldc, ldc, N, add);
  }
}

void gemm(long M, long N, long K, const float* A, bool a_turned, const float* B, bool b_turned, float* C) {
  const long lda = a_turned ? M : K, ldb = b_turned ? K : N;
  const long k_blocks = (K + KC - 1) / KC, kc = ((K + k_blocks - 1) / k_blocks + 31) / 32 * 32;
  Buffer packed_b = buffer(std::min(NC, (N + NR - 1) / NR * NR) * (kc / 2));
  for (long n0 = 0; n0 < N; n0 += NC)
    for (long k0 = 0; k0 < K; k0 += kc) {
      const long width = std::min(NC, N - n0), depth = std::min(kc, K - k0), words = (depth + 1) / 2, panels = (width + NR - 1) / NR;
      parallel(panels, [&](long p) {
        uint32_t* to = packed_b.get() + p * NR * (kc / 2);
        const long n = n0 + p * NR, left = std::min(NR, N - n);
        if (b_turned)
          pack_panel_transposed(B + n * ldb + k0, ldb, depth, left, to);
        else
          pack_interleaved(B + k0 * ldb + n, ldb, depth, left, to, NR);
      });
      parallel((M + MC - 1) / MC, [&](long block) {
        const long m0 = block * MC, height = std::min(MC, M - m0);
        alignas(64) uint32_t packed_a[MC * KC / 2];
        if (a_turned)
          pack_interleaved(A + k0 * lda + m0, lda, depth, height, packed_a, MC);
        else
          pack_rows(A + m0 * lda + k0, lda, height, depth, packed_a, kc / 2);
        for (long p = 0; p < panels; p++)
          tiles(height, words, packed_a, a_turned ? 1 : kc / 2, a_turned ? MC : 1, packed_b.get() + p * NR * (kc / 2), C + m0 * N + n0 + p * NR, N,
                std::min(NR, width - p * NR), k0 > 0);
      });
    }
}

}  // namespace
#pragma GCC pop_options

std::vector<paddle::Tensor> Bf16Matmul(const paddle::Tensor& a, const paddle::Tensor& b, bool a_turned, bool b_turned) {
  const auto x = a.shape(), y = b.shape();
  const long M = x[a_turned], K = x[!a_turned], N = y[!b_turned];
  PD_CHECK(K == y[b_turned], "inner dimensions differ");
  auto out = paddle::empty({M, N}, a.dtype(), a.place());
  gemm(M, N, K, a.data<float>(), a_turned, b.data<float>(), b_turned, out.data<float>());
  return {out};
}
static std::vector<std::vector<int64_t>> MatmulShape(const std::vector<int64_t>& a, const std::vector<int64_t>& b, const bool& a_turned, const bool& b_turned) {
  return {{a[a_turned], b[!b_turned]}};
}
static std::vector<paddle::DataType> MatmulType(paddle::DataType a, paddle::DataType b) { return {a}; }

PD_BUILD_OP(cpu_bf16_matmul)
    .Inputs({"a", "b"})
    .Outputs({"out"})
    .Attrs({"a_turned: bool", "b_turned: bool"})
    .SetKernelFn(PD_KERNEL(Bf16Matmul))
    .SetInferShapeFn(PD_INFER_SHAPE(MatmulShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(MatmulType));
