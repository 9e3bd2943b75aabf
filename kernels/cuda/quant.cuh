// y = x W with W stored as 4- or 8-bit codes (layout: kernels.quant_linear), for a few rows of x; and unpacking of W,
// for many rows.
//
// Few rows are bound by reading the codes: each once, 16 bytes per load (4 columns), 8 loads in flight per thread. A
// block takes 128 columns and 64 words of input rows (8 warps, 8 words each); a second kernel sums the parts along the
// input rows in order. code - zero is exact: the code becomes the low bits of the float 2^23, from which (2^23 + zero)
// is subtracted. Products and sums are float32; the scale is applied once per run of a group.
#pragma once
#include "common.cuh"

constexpr int BLOCK_WORDS = 64, WARP_WORDS = 8, COLUMNS = 128, QUANT_WARPS = BLOCK_WORDS / WARP_WORDS;

__device__ inline float zero_point(const int* zeros, long group, long out, long column,
                                   int bits) {  // stored minus 1; null: symmetric
  if (zeros == nullptr) return (float)(1 << (bits - 1));
  const unsigned word = zeros[(group * out + column) * bits / 32];
  return (float)(((word >> (column * bits % 32)) + 1) & ((1u << bits) - 1));
}

template <typename T, int BITS, int M>
__global__ void quant_rows(const T* x, const int* codes, const float* scales, const int* zeros, int rows, long in,
                           long out, int group, float* partial) {
  constexpr int PER = 32 / BITS, INPUTS = BLOCK_WORDS * PER;
  SHARED(float, shared);  // first x (INPUTS, M), then the warps' sums (QUANT_WARPS, M, COLUMNS)
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, row0 = blockIdx.z * M;
  const long first = (long)blockIdx.y * BLOCK_WORDS, words = in / PER;
  for (int i = threadIdx.x; i < INPUTS * M; i += blockDim.x) {
    const int m = i / INPUTS, j = i % INPUTS;
    const bool inside = row0 + m < rows && first * PER + j < in;
    shared[j * M + m] = inside ? to_float(x[(row0 + m) * in + first * PER + j]) : 0.0f;
  }
  __syncthreads();

  const long column = (long)blockIdx.x * COLUMNS + lane * 4;
  float total[M][4], sum[M][4], scale[4], shift[4];
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int c = 0; c < 4; c++) total[m][c] = sum[m][c] = 0.0f;
  if (column < out) {
    Vec<int, 4> packed[WARP_WORDS];
#pragma unroll
    for (int w = 0; w < WARP_WORDS; w++)
      if (first + warp * WARP_WORDS + w < words)
        packed[w] = load<4>(codes + (first + warp * WARP_WORDS + w) * out + column);
    long current = -1;
#pragma unroll
    for (int w = 0; w < WARP_WORDS; w++) {
      const long word = first + warp * WARP_WORDS + w, g = word * PER / group;
      if (word >= words) break;
      if (g != current) {  // uniform over the warp
#pragma unroll
        for (int c = 0; c < 4; c++) {
#pragma unroll
          for (int m = 0; m < M; m++)
            if (current >= 0) total[m][c] += sum[m][c] * scale[c], sum[m][c] = 0.0f;
          scale[c] = scales[g * out + column + c], shift[c] = 8388608.0f + zero_point(zeros, g, out, column + c, BITS);
        }
        current = g;
      }
#pragma unroll
      for (int j = 0; j < PER; j++) {
        const float* at = shared + ((warp * WARP_WORDS + w) * PER + j) * M;
#pragma unroll
        for (int c = 0; c < 4; c++) {
          const float code =
              __int_as_float(0x4B000000 | (((unsigned)packed[w].at[c] >> (j * BITS)) & ((1u << BITS) - 1))) - shift[c];
#pragma unroll
          for (int m = 0; m < M; m++) sum[m][c] += code * at[m];
        }
      }
    }
    if (current >= 0) {
#pragma unroll
      for (int m = 0; m < M; m++)
#pragma unroll
        for (int c = 0; c < 4; c++) total[m][c] += sum[m][c] * scale[c];
    }
  }
  __syncthreads();  // x is no longer needed
#pragma unroll
  for (int m = 0; m < M; m++)
#pragma unroll
    for (int c = 0; c < 4; c++) shared[(warp * M + m) * COLUMNS + lane * 4 + c] = total[m][c];
  __syncthreads();
  for (int i = threadIdx.x; i < M * COLUMNS; i += blockDim.x) {
    const int m = i / COLUMNS;
    const long to = (long)blockIdx.x * COLUMNS + i % COLUMNS;
    if (row0 + m >= rows || to >= out) continue;
    float value = 0.0f;
    for (int w = 0; w < QUANT_WARPS; w++) value += shared[w * M * COLUMNS + i];
    partial[((long)blockIdx.y * rows + row0 + m) * out + to] = value;
  }
}

// y (rows * out values) = sum over parts, plus the bias (out,) or null.
template <typename T>
__global__ void sum_of_splits(const float* partial, int parts, long values, long out, const T* bias, T* y) {
  const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= values) return;
  float sum = bias == nullptr ? 0.0f : to_float(bias[i % out]);
  for (int part = 0; part < parts; part++) sum += partial[part * values + i];
  y[i] = from_float<T>(sum);
}

template <typename T, int BITS>
__global__ void unpack_words(const int* codes, const float* scales, const int* zeros, long words, long out, int group,
                             T* weights) {
  constexpr int PER = 32 / BITS;
  const long i = (long)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= words * out) return;
  const long word = i / out, column = i % out, g = word * PER / group;
  const float scale = scales[g * out + column], zero = zero_point(zeros, g, out, column, BITS);
  const unsigned packed = codes[i];
#pragma unroll
  for (int j = 0; j < PER; j++)
    weights[(word * PER + j) * out + column] =
        from_float<T>(((float)((packed >> (j * BITS)) & ((1u << BITS) - 1)) - zero) * scale);
}

// ------------------------------------------------------------------------------------------------- launchers

extern "C" long quant_linear_parts(long in, int bits) { return ceil_div(in / (32 / bits), BLOCK_WORDS); }

template <typename T, int BITS, int M>
static void quant_rows_launch(const void* x, const int* codes, const float* scales, const int* zeros, int rows, long in,
                              long out, int group, float* partial, cudaStream_t stream) {
  constexpr int INPUTS = BLOCK_WORDS * 32 / BITS,
                VALUES = INPUTS > QUANT_WARPS * COLUMNS ? INPUTS : QUANT_WARPS * COLUMNS;
  auto* kernel = quant_rows<T, BITS, M>;
  LAUNCH(kernel, dim3(ceil_div(out, COLUMNS), quant_linear_parts(in, BITS), ceil_div(rows, M)), dim3(QUANT_WARPS * 32),
         VALUES * M * sizeof(float), stream, (const T*)x, codes, scales, zeros, rows, in, out, group, partial);
}

static bool quant_fits(const int* codes, long in, long out, int bits, int group) {
  return (bits == 4 || bits == 8) && in > 0 && out > 0 && group > 0 && in % (32 / bits) == 0 &&
         group % (32 / bits) == 0 && out % (32 / bits) == 0 && aligned(codes);
}

// x (rows, in), codes (in * bits/32, out), scales (ceil(in / group), out), zeros (groups, out * bits/32) or null, bias
// (out,) or null -> y (rows, out). partial: quant_linear_parts(in, bits) * rows * out floats. `group`, in and out are
// multiples of 32/bits.
extern "C" int launch_quant_linear(const void* x, const int* codes, const float* scales, const int* zeros,
                                   const void* bias, int rows, long in, long out, int bits, int group, void* y,
                                   float* partial, int dtype, cudaStream_t stream) {
  if (!quant_fits(codes, in, out, bits, group) || rows < 1) return (int)cudaErrorInvalidValue;
  WITH_TYPE(dtype, {
    auto* launch = bits == 4 ? (rows == 1   ? quant_rows_launch<T, 4, 1>
                                : rows <= 4 ? quant_rows_launch<T, 4, 4>
                                            : quant_rows_launch<T, 4, 8>)
                             : (rows == 1   ? quant_rows_launch<T, 8, 1>
                                : rows <= 4 ? quant_rows_launch<T, 8, 4>
                                            : quant_rows_launch<T, 8, 8>);
    launch(x, codes, scales, zeros, rows, in, out, group, partial, stream);
    auto* kernel = sum_of_splits<T>;
    LAUNCH(kernel, dim3(ceil_div(rows * out, 256)), dim3(256), 0, stream, partial, (int)quant_linear_parts(in, bits),
           rows * out, out, (const T*)bias, (T*)y);
  })
  return (int)cudaGetLastError();
}

// -> weights (in, out)
extern "C" int launch_dequantize(const int* codes, const float* scales, const int* zeros, long in, long out, int bits,
                                 int group, void* weights, int dtype, cudaStream_t stream) {
  if (!quant_fits(codes, in, out, bits, group)) return (int)cudaErrorInvalidValue;
  const long words = in / (32 / bits);
  WITH_TYPE(dtype, {
    auto* kernel = bits == 4 ? unpack_words<T, 4> : unpack_words<T, 8>;
    LAUNCH(kernel, dim3(ceil_div(words * out, 256)), dim3(256), 0, stream, codes, scales, zeros, words, out, group,
           (T*)weights);
  })
  return (int)cudaGetLastError();
}
