// Cross-entropy over rows of logits: statistics of a row in one pass, the gradient in place in another.
//
// For a row l with label t: lse = log sum_i exp l_i, loss = lse - l_t, d loss / d l_i = exp(l_i - lse) - (i == t).
// Maximum and sum are computed together: the sum is scaled by exp(old maximum - new maximum) when the maximum grows
// (Milakov & Gimelshein, arXiv 1805.02867). Forward reads the logits once; backward reads and writes them once. If
// softcap is not 0, l is softcap * tanh(logit / softcap), and the gradient has its derivative as a factor.
#pragma once
#include "common.cuh"

__device__ inline float softened(float logit, float cap) { return cap > 0.0f ? cap * tanhf(logit / cap) : logit; }
__device__ inline float slope_of(float softened, float cap) {
  return cap > 0.0f ? 1.0f - softened * softened / (cap * cap) : 1.0f;
}

struct Row {  // of a part of a row: largest logit, its first column, sum exp(l - largest)
  float top, sum;
  long at;
};

__device__ inline Row merged(Row a, Row b) {
  const float top = fmaxf(a.top, b.top);
  const bool second = b.top > a.top || (b.top == a.top && b.at < a.at);
  return {top, a.sum * expf(a.top - top) + b.sum * expf(b.top - top), second ? b.at : a.at};
}

__device__ inline Row warp_merged(Row row) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1)
    row = merged(
        row, {__shfl_xor_sync(WARP, row.top, o), __shfl_xor_sync(WARP, row.sum, o), __shfl_xor_sync(WARP, row.at, o)});
  return row;
}

// One block per row. target: the label's logit, 0 if the label is not in this row (sharded vocabulary).
template <typename T, int N>
__global__ void cross_entropy_rows(const T* logits, const int64_t* labels, long V, float cap, float* lse, float* target,
                                   int64_t* best) {
  SHARED(Row, shared);
  const long row = blockIdx.x;
  const T* l = logits + row * V;
  Row mine{-FLT_MAX, 0.0f, V};
  for (long i = (long)threadIdx.x * N; i < V; i += (long)blockDim.x * N) {
    const Vec<T, N> v = load<N>(l + i);
    float values[N], top = mine.top;
#pragma unroll
    for (int n = 0; n < N; n++) values[n] = softened(to_float(v.at[n]), cap), top = fmaxf(top, values[n]);
    mine.sum *= expf(mine.top - top);
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float value = values[n];
      mine.sum += expf(value - top);
      if (value > mine.top || mine.at == V) mine.top = value, mine.at = i + n;
    }
    mine.top = top;
  }
  mine = warp_merged(mine);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  if (lane == 0) shared[warp] = mine;
  __syncthreads();
  if (warp > 0) return;
  mine = warp_merged(lane < (int)blockDim.x / 32 ? shared[lane] : Row{-FLT_MAX, 0.0f, V});
  if (lane > 0) return;
  const int64_t label = labels[row];
  lse[row] = mine.top + logf(mine.sum);
  target[row] = label >= 0 && label < V ? softened(to_float(l[label]), cap) : 0.0f;
  best[row] = mine.at;
}

// `chunks` blocks per row, each writes CHUNK * N values per thread.
constexpr int CHUNK = 4;
template <typename T, int N>
__global__ void softmax_gradient_rows(T* logits, const int64_t* labels, const float* lse, const float* d_losses, long V,
                                      float cap, int chunks) {
  const long row = blockIdx.x / chunks, chunk = blockIdx.x % chunks;
  T* l = logits + row * V;
  const float shift = lse[row], d = d_losses[row];
  const int64_t label = labels[row];
  Vec<T, N> v[CHUNK];
  const long first = (chunk * CHUNK * blockDim.x + threadIdx.x) * N, step = (long)blockDim.x * N;
#pragma unroll
  for (int c = 0; c < CHUNK; c++)
    if (first + c * step < V) v[c] = load<N>(l + first + c * step);
#pragma unroll
  for (int c = 0; c < CHUNK; c++) {
    const long i = first + c * step;
    if (i >= V) break;
#pragma unroll
    for (int n = 0; n < N; n++) {
      const float value = softened(to_float(v[c].at[n]), cap);
      v[c].at[n] = from_float<T>((expf(value - shift) - (i + n == label ? 1.0f : 0.0f)) * d * slope_of(value, cap));
    }
    store<N>(l + i, v[c]);
  }
}

// ------------------------------------------------------------------------------------------------- launchers

template <typename T, int N>
static void cross_entropy_launch(const void* logits, const int64_t* labels, long rows, long V, float cap, float* lse,
                                 float* target, int64_t* best, cudaStream_t stream) {
  const int threads = V / N >= 512 ? 512 : V / N >= 128 ? 128 : 32;
  auto* kernel = cross_entropy_rows<T, N>;
  LAUNCH(kernel, dim3(rows), dim3(threads), 32 * sizeof(Row), stream, (const T*)logits, labels, V, cap, lse, target,
         best);
}

// logits (rows, V), labels (rows,) -> lse (rows,), target (rows,): the loss is lse - target; best (rows,): the argmax.
extern "C" int launch_cross_entropy(const void* logits, const int64_t* labels, long rows, long V, float cap, float* lse,
                                    float* target, int64_t* best, int dtype, cudaStream_t stream) {
  if (rows < 1 || V < 1) return (int)cudaErrorInvalidValue;
  WITH_TYPE(dtype, {
    constexpr int N = 16 / sizeof(T);
    if (V % N == 0 && aligned(logits))
      cross_entropy_launch<T, N>(logits, labels, rows, V, cap, lse, target, best, stream);
    else cross_entropy_launch<T, 1>(logits, labels, rows, V, cap, lse, target, best, stream);
  })
  return (int)cudaGetLastError();
}

template <typename T, int N>
static void softmax_gradient_launch(void* logits, const int64_t* labels, const float* lse, const float* d_losses,
                                    long rows, long V, float cap, cudaStream_t stream) {
  const int threads = V / N >= 256 ? 256 : 32;
  const long chunks = ceil_div(V, (long)threads * N * CHUNK);
  auto* kernel = softmax_gradient_rows<T, N>;
  LAUNCH(kernel, dim3(rows * chunks), dim3(threads), 0, stream, (T*)logits, labels, lse, d_losses, V, cap, (int)chunks);
}

// In place: logits (rows, V) -> (exp(l - lse) - onehot(labels)) * d_losses * slope.
extern "C" int launch_softmax_gradient(void* logits, const int64_t* labels, const float* lse, const float* d_losses,
                                       long rows, long V, float cap, int dtype, cudaStream_t stream) {
  if (rows < 1 || V < 1) return (int)cudaErrorInvalidValue;
  WITH_TYPE(dtype, {
    constexpr int N = 16 / sizeof(T);
    if (V % N == 0 && aligned(logits))
      softmax_gradient_launch<T, N>(logits, labels, lse, d_losses, rows, V, cap, stream);
    else softmax_gradient_launch<T, 1>(logits, labels, lse, d_losses, rows, V, cap, stream);
  })
  return (int)cudaGetLastError();
}
