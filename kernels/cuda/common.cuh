// Shared by the kernels of kernels/cuda: element types, 16-byte vectors, sums over a warp and a block, launching.
//
// The kernels do not depend on a framework: raw pointers, sizes, a stream. Launchers are `extern "C"`, return a
// cudaError_t as int, and are defined in headers that exactly one source file of a program includes (ops.cu for
// Paddle, tests/gpu/cuda_harness.cu for a bare GPU). tests/gpu/cuda_on_cpu.h, if included first, makes the same source
// host code. Statistics and sums are float32 for every element type, in an order that depends only on shapes: equal
// inputs give equal bits.
#pragma once
#include <cfloat>
#include <cstdint>

#ifdef __CUDACC__
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
// kernel: the name of a function or a pointer to one (template arguments contain commas, which would split the
// macro's).
#define LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#define SHARED(type, name)                   \
  extern __shared__ float4 shared_memory_[]; \
  type* name = reinterpret_cast<type*>(shared_memory_)
#endif

enum Dtype { FLOAT32 = 0, BFLOAT16 = 1, FLOAT16 = 2 };
#define WITH_TYPE(dtype, ...)            \
  switch (dtype) {                       \
    case FLOAT32: {                      \
      using T = float;                   \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case BFLOAT16: {                     \
      using T = __nv_bfloat16;           \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    case FLOAT16: {                      \
      using T = __half;                  \
      __VA_ARGS__;                       \
      break;                             \
    }                                    \
    default:                             \
      return (int)cudaErrorInvalidValue; \
  }

constexpr unsigned WARP = 0xffffffffu;  // all lanes

__device__ inline float to_float(float x) { return x; }
__device__ inline float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ inline float to_float(__half x) { return __half2float(x); }
__device__ inline float to_float(int8_t x) { return (float)x; }
template <typename T>
__device__ inline T from_float(float x);
template <>
__device__ inline float from_float<float>(float x) {
  return x;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16(x);
}
template <>
__device__ inline __half from_float<__half>(float x) {
  return __float2half(x);
}

// N values, loaded and stored together, in 16-byte accesses if they are that large.
template <typename T, int N>
struct alignas(sizeof(T) * N < 16 ? sizeof(T) * N : 16) Vec {
  T at[N];
};
template <int N, typename T>
__device__ inline Vec<T, N> load(const T* from) {
  return *reinterpret_cast<const Vec<T, N>*>(from);
}
template <int N, typename T>
__device__ inline void store(T* to, const Vec<T, N>& value) {
  *reinterpret_cast<Vec<T, N>*>(to) = value;
}

inline bool aligned(const void* pointer) { return (reinterpret_cast<uintptr_t>(pointer) & 15) == 0; }
inline long ceil_div(long a, long b) { return (a + b - 1) / b; }

__device__ inline float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(WARP, x, o);
  return x;
}

// Sum over all threads of the block, returned in every thread; `shared` holds 32 floats. The block size is a multiple
// of 32.
__device__ inline float block_sum(float x, float* shared) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  x = warp_sum(x);
  if (lane == 0) shared[warp] = x;
  __syncthreads();
  x = warp_sum(lane < (int)blockDim.x / 32 ? shared[lane] : 0.0f);
  __syncthreads();  // before `shared` is written again
  return x;
}
