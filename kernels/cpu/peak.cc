// Peak rates of this processor, for tests/bench/ops.py: products in registers on every thread, and passes over memory.
//
// One call measures one rate: 0 float32, 1 bfloat16 (vdpbf16ps), 2 int8 (vpdpbusd), 3 bfloat16 by AMX, 4 int8 by AMX,
// all in operations per second (a multiply-add is two); 5 reading, 6 copying `memory`, in bytes per second. 0 if the
// processor does not have it.
#include <immintrin.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>

#include "amx.h"
#include "op.h"
#include "panels.h"
#include "threads.h"

#define BODY "peak.h"
#include "every_isa.h"

static std::atomic<float> sink{0.0f};  // a use of the results, or the compiler removes the loops

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx512vnni")
static float dot_bf16(long rounds) {  // 24 chains of 32 multiply-adds
  __m512 c[24];                       // different start values: the compiler merges equal chains
#pragma GCC unroll 24
  for (int i = 0; i < 24; i++) c[i] = _mm512_set1_ps((float)i);
  const __m512bh a = (__m512bh)_mm512_set1_epi32(0x3F803F80),
                 b = (__m512bh)_mm512_set1_epi32(0x3F003F00);  // ones, halves
  for (long r = 0; r < rounds; r++)
#pragma GCC unroll 24
    for (int i = 0; i < 24; i++) c[i] = _mm512_dpbf16_ps(c[i], a, b);
#pragma GCC unroll 24
  for (int i = 1; i < 24; i++) c[0] = _mm512_add_ps(c[0], c[i]);
  return _mm512_cvtss_f32(c[0]);
}
static float dot_int8(long rounds) {  // 24 chains of 64
  __m512i c[24];
#pragma GCC unroll 24
  for (int i = 0; i < 24; i++) c[i] = _mm512_set1_epi32(i);
  const __m512i a = _mm512_set1_epi8(3), b = _mm512_set1_epi8(-2);
  for (long r = 0; r < rounds; r++)
#pragma GCC unroll 24
    for (int i = 0; i < 24; i++) {
      c[i] = _mm512_dpbusd_epi32(c[i], a, b);
      asm volatile("" : "+v"(c[i]));  // otherwise GCC 12 copies the sums back and forth
    }
#pragma GCC unroll 24
  for (int i = 1; i < 24; i++) c[0] = _mm512_add_epi32(c[0], c[i]);
  return (float)_mm512_cvtsi512_si32(c[0]);
}
#pragma GCC pop_options

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,amx-int8")
static void configure_tiles() {  // all eight: 16 rows of 64 bytes
  struct alignas(64) {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {};
    uint8_t rows[16] = {};
  } config;
  for (int i = 0; i < 8; i++) config.row_bytes[i] = 64, config.rows[i] = 16;
  asm volatile("" : : "r"(&config) : "memory");  // GCC 12 may drop the stores before the load below
  _tile_loadconfig(&config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_zero(4);
  _tile_zero(5);
  _tile_zero(6);
  _tile_zero(7);
}
static float tiles_bf16(long rounds) {  // 4 chains of 16 x 16 x 32
  configure_tiles();
  for (long r = 0; r < rounds; r++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
  return 0.0f;
}
static float tiles_int8(long rounds) {  // 4 chains of 16 x 16 x 64
  configure_tiles();
  for (long r = 0; r < rounds; r++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
  return 0.0f;
}
#pragma GCC pop_options

std::vector<paddle::Tensor> Peak(const paddle::Tensor& memory, int what, int tasks) {
  float* at = const_cast<float*>(memory.data<float>());  // the caller's scratch memory
  use_huge_pages(at, memory.numel() * sizeof(float));  // as weights are: page walks would slow the passes
  const long rounds = what == 3 || what == 4 ? 1 << 14 : 1 << 17, part = memory.numel() / tasks;
  const bool wide = level() == 2;
  float (*loop)(long) = nullptr;
  double work = 0.0;  // per task
  if (what == 0) loop = PICK(level(), multiply_add), work = PICK(level(), work_of_a_round)();
  if (what == 1 && wide && __builtin_cpu_supports("avx512bf16")) loop = dot_bf16, work = 24 * 32 * 2;
  if (what == 2 && wide && __builtin_cpu_supports("avx512vnni")) loop = dot_int8, work = 24 * 64 * 2;
  if (what == 3 && amx_bf16_ready()) loop = tiles_bf16, work = 4 * 16 * 16 * 32 * 2;
  if (what == 4 && amx_int8_ready()) loop = tiles_int8, work = 4 * 16 * 16 * 64 * 2;
  work *= rounds;
  if (what >= 5) work = part / (what == 5 ? 1 : 2) * (what == 5 ? 4.0 : 8.0);
  const auto start = std::chrono::steady_clock::now();
  if (work > 0)
    parallel(tasks, [&](long t) {
      if (what == 6) std::memcpy(at + t * part, at + t * part + part / 2, part / 2 * sizeof(float));
      else sink.store(loop ? loop(rounds) : PICK(level(), read_all)(at + t * part, part));
    });
  const double seconds = std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
  return {paddle::full({1}, work > 0 ? work * tasks / seconds : 0.0, memory.dtype(), memory.place())};
}
static std::vector<std::vector<int64_t>> PeakShape(const std::vector<int64_t>& memory) { return {{1}}; }
static std::vector<paddle::DataType> PeakType(paddle::DataType memory) { return {memory}; }

PD_BUILD_OP(cpu_peak)
    .Inputs({"memory"})
    .Outputs({"rate"})
    .Attrs({"what: int", "tasks: int"})
    .SetKernelFn(PD_KERNEL(Peak))
    .SetInferShapeFn(PD_INFER_SHAPE(PeakShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(PeakType));
