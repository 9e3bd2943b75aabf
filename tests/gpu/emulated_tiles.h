// Intel's AMX tile instructions as plain functions, for machines without them; included before kernels/cpu/amx.h.
//
// After the instruction set reference's pages of LDTILECFG, TILELOADD, TILESTORED, TILEZERO, TILERELEASE, TDPBF16PS and
// TDPBSSD. What a processor would refuse (#GP, #UD) and what it would not notice but is wrong here (bytes outside of
// the regions that the test names) is written to emulated_fault(); the instruction then does nothing.
#pragma once
#include <immintrin.h>
#include <pthread.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#define EMULATED_TILES

struct EmulatedTile {
  int rows, bytes;
  uint8_t data[16][64];
};
struct EmulatedRegion {
  const uint8_t *from, *to;
  bool writable;
};

static inline EmulatedTile* emulated_tiles() {
  static thread_local EmulatedTile tiles[8] = {};
  return tiles;
}
static inline bool& emulated_configured() {
  static thread_local bool configured = false;
  return configured;
}
static inline char* emulated_fault() {
  static char text[200] = "";
  return text;
}
static inline long* emulated_counts() {
  static long counts[4] = {};
  return counts;
}  // configurations, loads, products, stores
static inline std::vector<EmulatedRegion>& emulated_regions() {
  static std::vector<EmulatedRegion> regions;
  return regions;
}  // empty: all memory

static inline bool emulated_ok(bool right, const char* what) {
  if (!right && !*emulated_fault()) snprintf(emulated_fault(), 200, "%s", what);
  return right;
}
static inline bool emulated_reachable(const void* at, long bytes, bool to_write) {
  const uint8_t *from = (const uint8_t*)at, *to = from + bytes;
  const uint8_t* here = (const uint8_t*)__builtin_frame_address(0);
  if (from > here - 65536 && to < here + 65536) return true;  // what the kernel keeps on its stack
  for (const auto& r : emulated_regions())
    if (from >= r.from && to <= r.to && (r.writable || !to_write)) return true;
  return emulated_regions().empty();
}
static inline bool emulated_usable(int t, const char* what) {
  return emulated_ok(emulated_configured() && emulated_tiles()[t].rows && emulated_tiles()[t].bytes, what);
}

static inline void emulated_loadconfig(const void* from) {
  const uint8_t* c = (const uint8_t*)from;
  emulated_configured() = false;
  if (!emulated_ok(c[0] == 1, "LDTILECFG: palette is not 1") || !emulated_ok(c[1] == 0, "LDTILECFG: start row")) return;
  for (int i = 2; i < 64; i++)
    if ((i < 16 || (i >= 32 && i < 48) || i >= 56) &&
        !emulated_ok(c[i] == 0, "LDTILECFG: a reserved byte, or a tile past the eighth"))
      return;
  for (int t = 0; t < 8; t++) {
    const int bytes = c[16 + 2 * t] | c[17 + 2 * t] << 8, rows = c[48 + t];
    if (!emulated_ok(rows <= 16 && bytes <= 64 && !rows == !bytes, "LDTILECFG: rows or bytes of a tile")) return;
    emulated_tiles()[t] = {rows, bytes, {}};
  }
  emulated_counts()[0]++;
  emulated_configured() = true;
}
static inline void emulated_release() {
  emulated_configured() = false;
  for (int t = 0; t < 8; t++) emulated_tiles()[t] = {};
}
static inline void emulated_zero(int t) {
  if (emulated_usable(t, "TILEZERO: tile not configured"))
    std::memset(emulated_tiles()[t].data, 0, sizeof(emulated_tiles()[t].data));
}
static inline void emulated_load(int t, const void* base, long stride) {
  if (!emulated_usable(t, "TILELOADD: tile not configured")) return;
  EmulatedTile& tile = emulated_tiles()[t];
  std::memset(tile.data, 0, sizeof(tile.data));
  emulated_counts()[1]++;
  for (int r = 0; r < tile.rows; r++) {
    const uint8_t* at = (const uint8_t*)base + r * stride;
    if (emulated_ok(emulated_reachable(at, tile.bytes, false), "TILELOADD: outside of the buffers"))
      std::memcpy(tile.data[r], at, tile.bytes);
  }
}
static inline void emulated_store(int t, void* base, long stride) {
  if (!emulated_usable(t, "TILESTORED: tile not configured")) return;
  EmulatedTile& tile = emulated_tiles()[t];
  emulated_counts()[3]++;
  for (int r = 0; r < tile.rows; r++) {
    uint8_t* at = (uint8_t*)base + r * stride;
    if (emulated_ok(emulated_reachable(at, tile.bytes, true), "TILESTORED: outside of the buffers"))
      std::memcpy(at, tile.data[r], tile.bytes);
  }
}
static inline bool emulated_fit(int c, int a, int b) {
  if (!emulated_usable(c, "TDP: C not configured") || !emulated_usable(a, "TDP: A not configured") ||
      !emulated_usable(b, "TDP: B not configured"))
    return false;
  const EmulatedTile *t = emulated_tiles(), &C = t[c], &A = t[a], &B = t[b];
  emulated_counts()[2]++;
  return emulated_ok(c != a && c != b && a != b, "TDP: the same tile twice") &&
         emulated_ok(C.bytes % 4 == 0 && A.bytes % 4 == 0 && B.bytes % 4 == 0, "TDP: rows of whole words") &&
         emulated_ok(C.rows == A.rows && C.bytes == B.bytes && A.bytes / 4 == B.rows, "TDP: shapes of C, A and B");
}
static inline float emulated_flushed(float x) {
  return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x;
}
static inline float emulated_bf16(const uint8_t* row, int i) {
  uint16_t half;
  std::memcpy(&half, row + 2 * i, 2);
  const uint32_t whole = (uint32_t)half << 16;
  float x;
  std::memcpy(&x, &whole, 4);
  return emulated_flushed(x);
}
// The even and the odd half of every pair are summed apart, added to each other, then to C; each step is rounded.
static inline void emulated_dpbf16ps(int c, int a, int b) {
  if (!emulated_fit(c, a, b)) return;
  EmulatedTile *t = emulated_tiles(), &C = t[c], &A = t[a], &B = t[b];
  for (int m = 0; m < C.rows; m++)
    for (int n = 0; n < C.bytes / 4; n++) {
      float even = 0.0f, odd = 0.0f, sum;
      for (int k = 0; k < A.bytes / 4; k++) {
        even = emulated_flushed(std::fma(emulated_bf16(A.data[m], 2 * k), emulated_bf16(B.data[k], 2 * n), even));
        odd = emulated_flushed(std::fma(emulated_bf16(A.data[m], 2 * k + 1), emulated_bf16(B.data[k], 2 * n + 1), odd));
      }
      std::memcpy(&sum, C.data[m] + 4 * n, 4);
      sum = emulated_flushed(emulated_flushed(sum) + emulated_flushed(even + odd));
      std::memcpy(C.data[m] + 4 * n, &sum, 4);
    }
}
static inline void emulated_dpbssd(int c, int a, int b) {
  if (!emulated_fit(c, a, b)) return;
  EmulatedTile *t = emulated_tiles(), &C = t[c], &A = t[a], &B = t[b];
  for (int m = 0; m < C.rows; m++)
    for (int n = 0; n < C.bytes / 4; n++) {
      uint32_t sum;
      std::memcpy(&sum, C.data[m] + 4 * n, 4);
      for (int k = 0; k < A.bytes; k++)
        sum += (uint32_t)((int)(int8_t)A.data[m][k] * (int)(int8_t)B.data[k / 4][4 * n + k % 4]);
      std::memcpy(C.data[m] + 4 * n, &sum, 4);
    }
}

#undef _tile_loadd
#undef _tile_stored
#undef _tile_zero
#undef _tile_dpbf16ps
#undef _tile_dpbssd
#define _tile_loadconfig emulated_loadconfig
#define _tile_release emulated_release
#define _tile_zero emulated_zero
#define _tile_loadd emulated_load
#define _tile_stored emulated_store
#define _tile_dpbf16ps emulated_dpbf16ps
#define _tile_dpbssd emulated_dpbssd
