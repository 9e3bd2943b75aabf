// Runs CUDA kernels as host code: included first (g++ -include), it gives their source what nvcc would.
//
// Each CUDA thread of a block is a fiber of its own (ucontext). It runs until it reaches a barrier or a warp exchange
// and waits there; when every thread of the block waits or has ended, those whose wait is complete go on. Blocks run
// one after another. What would be undefined on a GPU is an error here, kept for cudaGetLastError() and
// cuda_on_cpu_message():
//   __syncthreads() that not all threads of the block reach at the same place; a shuffle that not all lanes of its mask
//   reach, or from a lane outside the mask; shared memory written past its end; a grid or block that no GPU takes.
// Shared memory starts as NaN, and cuda_on_cpu_order chooses in which order the threads run between two barriers (0 up,
// 1 down, 2 at random), so that a result that lacks a barrier differs. -fsanitize=address finds any access outside of
// arrays that the caller allocated exactly, -fsanitize=alignment a vector load that a GPU would refuse.
#pragma once
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(long x = 1, long y = 1, long z = 1) : x((unsigned)x), y((unsigned)y), z((unsigned)z) {}
};
static dim3 threadIdx, blockIdx, blockDim, gridDim;

typedef void* cudaStream_t;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorLaunchFailure = 719 };

// What tests/gpu/cuda_harness.cu asks of the runtime; events know no time.
enum cudaMemcpyKind { cudaMemcpyHostToDevice, cudaMemcpyDeviceToHost, cudaMemcpyDeviceToDevice };
typedef int cudaEvent_t;
static inline cudaError_t cudaMalloc(void** at, size_t bytes) {
  return (*at = std::malloc(bytes)) ? cudaSuccess : cudaErrorInvalidValue;
}
static inline void cudaFree(void* at) { std::free(at); }
static inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}
static inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind, cudaStream_t) {
  return cudaMemcpy(to, from, bytes, kind);
}
static inline cudaError_t cudaEventCreate(cudaEvent_t*) { return cudaSuccess; }
static inline cudaError_t cudaEventRecord(cudaEvent_t, cudaStream_t) { return cudaSuccess; }
static inline cudaError_t cudaEventSynchronize(cudaEvent_t) { return cudaSuccess; }
static inline cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t, cudaEvent_t) {
  return *milliseconds = 1.0f, cudaSuccess;
}

struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};
template <typename To, typename From>
static To bits_of(From from) {
  static_assert(sizeof(To) == sizeof(From), "");
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}
static inline float __int_as_float(int x) { return bits_of<float>(x); }
static inline float __bfloat162float(__nv_bfloat16 x) { return bits_of<float>((uint32_t)x.bits << 16); }
static inline __nv_bfloat16 __float2bfloat16(float x) {  // to the nearest, ties to even
  const uint32_t bits = bits_of<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {(uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
static inline float __half2float(__half x) { return (float)bits_of<_Float16>(x.bits); }
static inline __half __float2half(float x) { return {bits_of<uint16_t>((_Float16)x)}; }

namespace cuda_on_cpu {

constexpr size_t STACK = 64 << 10, GUARD = 64;
enum Wait { NONE, BLOCK, SHUFFLE, ENDED };

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(STACK);
  Wait wait = NONE;
  int line = 0;
  unsigned mask = 0;
  uint64_t given = 0, shown = 0;  // by a shuffle: what this lane gives, and what the others may read until the next one
};

static std::vector<Fiber> fibers;
static ucontext_t scheduler;
static size_t current = 0;
static std::string message;
static char* shared_memory = nullptr;
static const std::function<void()>* body = nullptr;
static std::mt19937 shuffle_generator(0);

static void fail(const std::string& what) {
  if (message.empty())
    message = what + " (block " + std::to_string(blockIdx.x) + "," + std::to_string(blockIdx.y) + "," +
              std::to_string(blockIdx.z) + ")";
}
static void enter() {
  (*body)();
  fibers[current].wait = ENDED;
  swapcontext(&fibers[current].context, &scheduler);
}
static void wait(Wait kind, int line, unsigned mask) {
  Fiber& self = fibers[current];
  self.wait = kind, self.line = line, self.mask = mask;
  swapcontext(&self.context, &scheduler);
}

template <typename V>
static V shuffle(unsigned mask, V value, int from, int line) {
  static_assert(sizeof(V) <= 8, "");
  const size_t self = current, warp = self / 32 * 32;
  std::memcpy(&fibers[self].given, &value, sizeof(V));
  if (!(mask >> (self % 32) & 1))
    fail("line " + std::to_string(line) + ": a lane shuffles that is not in its own mask");
  wait(SHUFFLE, line, mask);
  if (from < 0 || from > 31) from = (int)(self % 32);  // the lane's own value, as on a GPU
  if (!(mask >> from & 1)) fail("line " + std::to_string(line) + ": a shuffle from a lane outside the mask");
  else std::memcpy(&value, &fibers[warp + from].shown, sizeof(V));
  return value;
}

// Lets threads go on whose barrier or exchange is complete; false if none is.
static bool release(size_t threads) {
  bool any = false;
  for (size_t t = 0; t < threads; t++) {
    if (fibers[t].wait != SHUFFLE) continue;
    const unsigned mask = fibers[t].mask;
    const int line = fibers[t].line;
    bool complete = true;
    for (size_t lane = 0; lane < 32; lane++) {
      const size_t other = t / 32 * 32 + lane;
      if (mask >> lane & 1)
        complete &= other < threads && fibers[other].wait == SHUFFLE && fibers[other].mask == mask &&
                    fibers[other].line == line;
    }
    if (!complete) continue;
    for (size_t lane = 0; lane < 32; lane++)
      if (mask >> lane & 1)
        fibers[t / 32 * 32 + lane].shown = fibers[t / 32 * 32 + lane].given, fibers[t / 32 * 32 + lane].wait = NONE;
    any = true;
  }
  if (any) return true;
  for (size_t t = 0; t < threads; t++)
    if (fibers[t].wait != BLOCK || fibers[t].line != fibers[0].line) return false;
  for (size_t t = 0; t < threads; t++) fibers[t].wait = NONE;
  return true;
}

extern "C" int cuda_on_cpu_order;
int cuda_on_cpu_order = 0;

static void run_block(size_t threads) {
  std::vector<size_t> order(threads);
  for (size_t t = 0; t < threads; t++) {
    Fiber& fiber = fibers[t];
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data(), fiber.context.uc_stack.ss_size = STACK,
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
    fiber.wait = NONE;
    order[t] = cuda_on_cpu_order == 1 ? threads - 1 - t : t;
  }
  for (;;) {
    if (cuda_on_cpu_order == 2) std::shuffle(order.begin(), order.end(), shuffle_generator);
    for (size_t t : order) {
      if (fibers[t].wait != NONE) continue;
      current = t;
      threadIdx = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / blockDim.x / blockDim.y);
      swapcontext(&scheduler, &fibers[t].context);
      if (!message.empty()) return;
    }
    size_t ended = 0;
    for (size_t t = 0; t < threads; t++) ended += fibers[t].wait == ENDED;
    if (ended == threads) return;
    if (release(threads)) continue;
    std::string where;
    for (size_t t = 0; t < threads; t++)
      if (fibers[t].wait != ENDED && where.find(std::to_string(fibers[t].line)) == std::string::npos)
        where += (where.empty() ? "" : ", ") +
                 std::string(fibers[t].wait == BLOCK ? "__syncthreads() of line " : "a shuffle of line ") +
                 std::to_string(fibers[t].line);
    return fail("threads wait for ever at " + where + "; " + std::to_string(ended) + " of " + std::to_string(threads) +
                " have ended");
  }
}

static void launch(dim3 grid, dim3 block, size_t shared, const std::function<void()>& kernel) {
  const size_t threads = (size_t)block.x * block.y * block.z;
  if (!message.empty()) return;
  blockIdx = dim3(0, 0, 0);
  if (threads < 1 || threads > 1024) return fail("a block of " + std::to_string(threads) + " threads");
  if (shared > 48 << 10) return fail(std::to_string(shared) + " bytes of shared memory");
  if (grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return fail("a grid that no GPU takes");
  if (fibers.size() < threads) fibers.resize(threads);
  gridDim = grid, blockDim = block, body = &kernel;
  for (unsigned z = 0; z < grid.z; z++)
    for (unsigned y = 0; y < grid.y; y++)
      for (unsigned x = 0; x < grid.x; x++) {
        blockIdx = dim3(x, y, z);
        std::vector<char> memory(shared + GUARD, (char)0xff);
        shared_memory = memory.data();
        run_block(threads);
        for (size_t i = 0; i < GUARD; i++)
          if (memory[shared + i] != (char)0xff)
            fail("shared memory written past its " + std::to_string(shared) + " bytes");
        if (!message.empty()) return;
      }
}

}  // namespace cuda_on_cpu

// A failed launch is kept until it is asked for, as on a GPU; its words stay.
static std::string last_message;
static inline cudaError_t cudaGetLastError() {
  last_message = cuda_on_cpu::message;
  cuda_on_cpu::message.clear();
  return last_message.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
extern "C" const char* cuda_on_cpu_message() { return last_message.c_str(); }

#define LAUNCH(kernel, grid, block, shared, stream, ...) \
  cuda_on_cpu::launch(grid, block, shared, [&] { kernel(__VA_ARGS__); })
#define SHARED(type, name) type* name = reinterpret_cast<type*>(cuda_on_cpu::shared_memory)
#define __syncthreads() cuda_on_cpu::wait(cuda_on_cpu::BLOCK, __LINE__, 0)
#define __shfl_xor_sync(mask, value, distance) \
  cuda_on_cpu::shuffle(mask, value, (int)(cuda_on_cpu::current % 32) ^ (distance), __LINE__)
#define __shfl_down_sync(mask, value, distance) \
  cuda_on_cpu::shuffle(mask, value, (int)(cuda_on_cpu::current % 32) + (distance), __LINE__)
#define __shfl_sync(mask, value, lane) cuda_on_cpu::shuffle(mask, value, lane, __LINE__)
