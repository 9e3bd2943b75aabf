// rms_norm after an addition: h = x + residual, y = h r w with r = 1 / sqrt(mean(h^2) + epsilon); and its backward.
//
// Forward reads x and residual once and writes h and y; the row stays in the block's registers. Backward, with g = dy
// w: dx = d residual = r (g - h r^2 mean(g h)) + dh, dw = sum over rows of dy h r. Each block sums dw of its rows in
// registers and writes it once; a second kernel sums the blocks' parts in order.
#pragma once
#include "common.cuh"

constexpr int MOST_THREADS = 512;  // per block, which leaves 128 registers per thread
// Blocks of the backward pass, two for each of 132 multiprocessors; they determine the order of dw's sum.
constexpr int MOST_PARTS = 264;

// N values per vector, PER vectors per thread: a block covers N * PER * blockDim.x >= D values.
template <typename T, int N, int PER>
__global__ void __launch_bounds__(MOST_THREADS)
    rms_norm_rows(const T* x, const T* residual, const T* w, long D, float epsilon, T* h, T* y, float* r) {
  SHARED(float, shared);
  const long row = blockIdx.x * D;
  float value[PER][N], squares = 0.0f;
#pragma unroll
  for (int p = 0; p < PER; p++) {
    const long d = ((long)p * blockDim.x + threadIdx.x) * N;
    if (d >= D) break;
    Vec<T, N> v = load<N>(x + row + d);
    if (residual != nullptr) {
      const Vec<T, N> added = load<N>(residual + row + d);
#pragma unroll
      for (int n = 0; n < N; n++) v.at[n] = from_float<T>(to_float(v.at[n]) + to_float(added.at[n]));
      store<N>(h + row + d, v);
    }
#pragma unroll
    for (int n = 0; n < N; n++) value[p][n] = to_float(v.at[n]), squares += value[p][n] * value[p][n];
  }
  const float scale = 1.0f / sqrtf(block_sum(squares, shared) / (float)D + epsilon);
#pragma unroll
  for (int p = 0; p < PER; p++) {
    const long d = ((long)p * blockDim.x + threadIdx.x) * N;
    if (d >= D) break;
    const Vec<T, N> weight = load<N>(w + d);
    Vec<T, N> v;
#pragma unroll
    for (int n = 0; n < N; n++) v.at[n] = from_float<T>(value[p][n] * scale * to_float(weight.at[n]));
    store<N>(y + row + d, v);
  }
  if (threadIdx.x == 0) r[blockIdx.x] = scale;
}

template <typename T, int N, int PER>
__global__ void __launch_bounds__(MOST_THREADS)
    rms_norm_rows_backward(const T* h, const T* w, const float* r, const T* dy, const T* dh, long rows, long D, T* dx,
                           float* parts) {
  SHARED(float, shared);
  float dw[PER][N];
#pragma unroll
  for (int p = 0; p < PER; p++)
#pragma unroll
    for (int n = 0; n < N; n++) dw[p][n] = 0.0f;
  for (long row = blockIdx.x; row < rows; row += gridDim.x) {
    Vec<T, N> hs[PER], gs[PER];
    float products = 0.0f;
#pragma unroll
    for (int p = 0; p < PER; p++) {
      const long d = ((long)p * blockDim.x + threadIdx.x) * N;
      if (d >= D) break;
      hs[p] = load<N>(h + row * D + d), gs[p] = load<N>(dy + row * D + d);
      const Vec<T, N> weight = load<N>(w + d);
#pragma unroll
      for (int n = 0; n < N; n++) products += to_float(gs[p].at[n]) * to_float(weight.at[n]) * to_float(hs[p].at[n]);
    }
    const float scale = r[row], mean = block_sum(products, shared) / (float)D * scale * scale;
#pragma unroll
    for (int p = 0; p < PER; p++) {
      const long d = ((long)p * blockDim.x + threadIdx.x) * N;
      if (d >= D) break;
      const Vec<T, N> weight = load<N>(w + d);
      Vec<T, N> out;
      if (dh != nullptr) out = load<N>(dh + row * D + d);
#pragma unroll
      for (int n = 0; n < N; n++) {
        const float value = to_float(hs[p].at[n]), g = to_float(gs[p].at[n]);
        dw[p][n] += g * value * scale;
        const float through = scale * (g * to_float(weight.at[n]) - value * mean);
        out.at[n] = from_float<T>(dh == nullptr ? through : through + to_float(out.at[n]));
      }
      store<N>(dx + row * D + d, out);
    }
  }
#pragma unroll
  for (int p = 0; p < PER; p++) {
    const long d = ((long)p * blockDim.x + threadIdx.x) * N;
    if (d >= D) break;
#pragma unroll
    for (int n = 0; n < N; n++) parts[blockIdx.x * D + d + n] = dw[p][n];
  }
}

// dw[d] = sum over parts: 32 columns per block, whose 8 warps take every eighth part.
template <typename T>
__global__ void sum_of_parts(const float* parts, int count, long D, T* dw) {
  SHARED(float, shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const long d = (long)blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (d < D)
    for (int part = warp; part < count; part += 8) sum += parts[part * D + d];
  shared[threadIdx.x] = sum;
  __syncthreads();
  if (warp > 0 || d >= D) return;
  for (int other = 1; other < 8; other++) sum += shared[other * 32 + lane];
  dw[d] = from_float<T>(sum);
}

// ------------------------------------------------------------------------------------------------- launchers

// Runs the code with N values per vector, PER vectors per thread and `threads` threads for a row of D values: about
// 256 threads, more if a thread would hold more than four vectors. `whole`: D is a multiple of a 16-byte vector and
// all rows are aligned.
#define WITH_VECTORS_OF(n, per, vectors, ...)                      \
  {                                                                \
    constexpr int N = n, PER = per;                                \
    const int threads = (int)ceil_div(vectors, PER * 32) * 32;     \
    if (threads > MOST_THREADS) return (int)cudaErrorInvalidValue; \
    __VA_ARGS__                                                    \
  }
#define WITH_VECTORS(D, whole, ...)                                                      \
  {                                                                                      \
    constexpr int WIDE = 16 / sizeof(T);                                                 \
    if ((whole) && D <= 256 * WIDE) WITH_VECTORS_OF(WIDE, 1, D / WIDE, __VA_ARGS__)      \
    else if ((whole) && D <= 512 * WIDE) WITH_VECTORS_OF(WIDE, 2, D / WIDE, __VA_ARGS__) \
    else if (whole) WITH_VECTORS_OF(WIDE, 4, D / WIDE, __VA_ARGS__)                      \
    else if (D <= 512) WITH_VECTORS_OF(1, 1, D, __VA_ARGS__)                             \
    else WITH_VECTORS_OF(1, 16, D, __VA_ARGS__)                                          \
  }

extern "C" long rms_norm_parts(long rows) { return rows < MOST_PARTS ? rows : MOST_PARTS; }

// x, residual (or null: then h is not written) (rows, D), w (D,) -> h, y (rows, D), r (rows,).
// D at most 8,192, or 16,384 in 2-byte dtypes if it is a multiple of 8; else cudaErrorInvalidValue.
extern "C" int launch_rms_norm(const void* x, const void* residual, const void* w, long rows, long D, float epsilon,
                               void* h, void* y, float* r, int dtype, cudaStream_t stream) {
  if (rows < 1 || D < 1) return (int)cudaErrorInvalidValue;
  WITH_TYPE(dtype, {
    const bool whole =
        D % (16 / sizeof(T)) == 0 && aligned(x) && aligned(residual) && aligned(w) && aligned(h) && aligned(y);
    WITH_VECTORS(D, whole, {
      auto* kernel = rms_norm_rows<T, N, PER>;
      LAUNCH(kernel, dim3(rows), dim3(threads), 32 * sizeof(float), stream, (const T*)x, (const T*)residual,
             (const T*)w, D, epsilon, (T*)h, (T*)y, r);
    })
  })
  return (int)cudaGetLastError();
}

// dh (or null): gradient of h. parts: workspace of rms_norm_parts(rows) * D floats -> dx (rows, D), dw (D,).
extern "C" int launch_rms_norm_backward(const void* h, const void* w, const float* r, const void* dy, const void* dh,
                                        long rows, long D, void* dx, void* dw, float* parts, int dtype,
                                        cudaStream_t stream) {
  if (rows < 1 || D < 1) return (int)cudaErrorInvalidValue;
  const int count = (int)rms_norm_parts(rows);
  WITH_TYPE(dtype, {
    const bool whole =
        D % (16 / sizeof(T)) == 0 && aligned(h) && aligned(w) && aligned(dy) && aligned(dh) && aligned(dx);
    WITH_VECTORS(D, whole, {
      auto* kernel = rms_norm_rows_backward<T, N, PER>;
      LAUNCH(kernel, dim3(count), dim3(threads), 32 * sizeof(float), stream, (const T*)h, (const T*)w, r, (const T*)dy,
             (const T*)dh, rows, D, (T*)dx, parts);
    })
    auto* kernel = sum_of_parts<T>;
    LAUNCH(kernel, dim3(ceil_div(D, 32)), dim3(256), 256 * sizeof(float), stream, parts, count, D, (T*)dw);
  })
  return (int)cudaGetLastError();
}
