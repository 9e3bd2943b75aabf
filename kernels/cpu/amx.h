// Products on AMX tiles: up to 64 columns of B at a time, bfloat16 pairs into float32, or int8 quads into int32.
//
// A word is 32 bits of the inner dimension: a pair (k, k+1) of bfloat16, or a quad (k … k+3) of int8, lowest bits
// first. A: word [m * a_stride + w], each row zero-padded to a multiple of 16 words. B: word [w * 64 + n], columns
// zero-padded to 64. Eight tiles: 2 x 2 of C, 16 x 16 each, two of A, two of B, so that four loads feed four products;
// for up to 16 rows 1 x 4 of C, one of A, three of B, so that B is read in order. Sums in order of k.
//
// The order of stores and tile loads is ours to keep: GCC 12 believes that _tile_loadconfig reads 8 bytes and
// _tile_loadd none.
#pragma once
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>

// Whether this processor has tiles, the system saves them, and this process may use them; asked once.
static inline bool amx_allowed() {
#ifdef EMULATED_TILES  // tests/gpu/emulated_tiles.h stands in for the instructions
  return true;
#else
  static const bool allowed = [] {
    constexpr unsigned TILE_STATE = 3u << 17;  // of XCR0: configuration and data
    constexpr long REQUEST_PERMISSION = 0x1023, TILE_DATA = 18;
    unsigned a, b, c, d, low, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c & bit_OSXSAVE)) return false;
    asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
    return (low & TILE_STATE) == TILE_STATE && syscall(SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0;
  }();
  return allowed;
#endif
}
static inline bool amx_has(unsigned bit) {  // of leaf 7, EDX
#ifdef EMULATED_TILES
  return true;
#else
  constexpr unsigned TILES = 1u << 24;
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & TILES) && (d & bit) && amx_allowed();
#endif
}
static inline bool amx_bf16_ready() {
  static const bool ready = amx_has(1u << 22);
  return ready;
}
static inline bool amx_int8_ready() {
  static const bool ready = amx_has(1u << 25);
  return ready;
}

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16,amx-int8")

// Tiles 0 … 3 are C (2 * row of tiles + column of tiles), 4 and 5 A, 6 and 7 B; a size of 0 leaves its tiles unused.
struct AmxShape {
  long rows[2], columns[2];
  bool operator!=(const AmxShape& o) const {
    return rows[0] != o.rows[0] || rows[1] != o.rows[1] || columns[0] != o.columns[0] || columns[1] != o.columns[1];
  }
};

struct alignas(64) AmxConfiguration {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};  // of a tile's row
  uint8_t rows[16] = {};
  void set(int tile, long of_rows, long columns) {
    if (of_rows && columns) rows[tile] = (uint8_t)of_rows, bytes[tile] = (uint16_t)(4 * columns);
  }
  void load() const {
    asm volatile("" : : "r"(this) : "memory");  // all that was stored so far is in memory
    _tile_loadconfig(this);
  }
};

static inline void amx_configure(const AmxShape& shape) {
  AmxConfiguration tiles;
  for (int i = 0; i < 2; i++) {
    for (int j = 0; j < 2; j++) tiles.set(2 * i + j, shape.rows[i], shape.columns[j]);
    tiles.set(4 + i, shape.rows[i], 16);
    tiles.set(6 + i, 16, shape.columns[i]);
  }
  tiles.load();
}
// Tiles 0 … 3 are C, side by side, 4 is A, 5 … 7 B.
static inline void amx_configure_flat(long rows) {
  AmxConfiguration tiles;
  for (int i = 0; i < 8; i++) tiles.set(i, i < 5 ? rows : 16, 16);
  tiles.load();
}

enum class AmxWords { bf16, int8 };
constexpr long AMX_DEPTH = 128;  // words of the inner dimension at a time: the first cache holds half a panel's 16 KB
constexpr long AMX_AHEAD = 16;   // words of the inner dimension between what few rows read and what they ask for

#define AMX_DOT(c, a, b)                     \
  {                                          \
    if constexpr (WORDS == AmxWords::bf16) { \
      _tile_dpbf16ps(c, a, b);               \
    } else {                                 \
      _tile_dpbssd(c, a, b);                 \
    }                                        \
  }

// Up to 32 x 32 of C; the last, incomplete 16 rows of B lie in `last`. Each step asks for `rows_ahead` rows of the part
// of B that is read next.
template <AmxWords WORDS, bool TALL, bool BROAD>
static inline void amx_block(long words, const uint32_t* A, long a_stride, const uint32_t* B, const uint32_t* last,
                             uint32_t* C, long ldc, bool add, const uint32_t* ahead, long rows_ahead) {
  if (add) {
    _tile_loadd(0, C, 4 * ldc);
    if constexpr (BROAD) _tile_loadd(1, C + 16, 4 * ldc);
    if constexpr (TALL) _tile_loadd(2, C + 16 * ldc, 4 * ldc);
    if constexpr (TALL && BROAD) _tile_loadd(3, C + 16 * ldc + 16, 4 * ldc);
  } else {
    _tile_zero(0);
    if constexpr (BROAD) _tile_zero(1);
    if constexpr (TALL) _tile_zero(2);
    if constexpr (TALL && BROAD) _tile_zero(3);
  }
  for (long w = 0; w < words; w += 16) {
    const uint32_t* b = w + 16 <= words ? B + w * 64 : last;
    for (long row = 0; row < rows_ahead; row++) {
      __builtin_prefetch(ahead + (w + row) * 64, 0, 2);
      __builtin_prefetch(ahead + (w + row) * 64 + 16, 0, 2);
    }
    _tile_loadd(4, A + w, 4 * a_stride);
    _tile_loadd(6, b, 256);
    AMX_DOT(0, 4, 6)
    if constexpr (TALL) {
      _tile_loadd(5, A + 16 * a_stride + w, 4 * a_stride);
      AMX_DOT(2, 5, 6)
    }
    if constexpr (BROAD) {
      _tile_loadd(7, b + 16, 256);
      AMX_DOT(1, 4, 7)
    }
    if constexpr (TALL && BROAD) AMX_DOT(3, 5, 7)
  }
  _tile_stored(0, C, 4 * ldc);
  if constexpr (BROAD) _tile_stored(1, C + 16, 4 * ldc);
  if constexpr (TALL) _tile_stored(2, C + 16 * ldc, 4 * ldc);
  if constexpr (TALL && BROAD) _tile_stored(3, C + 16 * ldc + 16, 4 * ldc);
}
// Up to 16 x 64 of C. Few rows are bound by reading B: each step reads 4 KB in order, and asks for what comes later.
template <AmxWords WORDS>
static inline void amx_flat(long words, const uint32_t* A, long a_stride, const uint32_t* B, const uint32_t* last,
                            uint32_t* C, long ldc, bool add) {
  if (add) {
    _tile_loadd(0, C, 4 * ldc);
    _tile_loadd(1, C + 16, 4 * ldc);
    _tile_loadd(2, C + 32, 4 * ldc);
    _tile_loadd(3, C + 48, 4 * ldc);
  } else {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  }
  for (long w = 0; w < words; w += 16) {
    const uint32_t* b = w + 16 <= words ? B + w * 64 : last;
    for (long line = 0; line < 64; line++) __builtin_prefetch(b + AMX_AHEAD * 64 + 16 * line);
    _tile_loadd(4, A + w, 4 * a_stride);
    _tile_loadd(5, b, 256);
    AMX_DOT(0, 4, 5)
    _tile_loadd(6, b + 16, 256);
    AMX_DOT(1, 4, 6)
    _tile_loadd(7, b + 32, 256);
    AMX_DOT(2, 4, 7)
    _tile_loadd(5, b + 48, 256);
    AMX_DOT(3, 4, 5)
  }
  _tile_stored(0, C, 4 * ldc);
  _tile_stored(1, C + 16, 4 * ldc);
  _tile_stored(2, C + 32, 4 * ldc);
  _tile_stored(3, C + 48, 4 * ldc);
}
#undef AMX_DOT

template <AmxWords WORDS>
static inline void amx_tiles(long M, long words, const uint32_t* A, long a_stride, const uint32_t* B, uint32_t* C,
                             long ldc, long N, bool add) {
  if (M < 1 || N < 1) return;
  alignas(64) uint32_t last[16 * 64] = {};
  std::copy(B + words / 16 * 16 * 64, B + words * 64, last);
  if (M <= 16 && N == 64) {
    amx_configure_flat(M);
    amx_flat<WORDS>(words, A, a_stride, B, last, C, ldc, add);
    return _tile_release();
  }
  AmxShape now = {};
  const long rows_ahead = 16 / ((M + 31) / 32);
  for (long w = 0; w < words; w += AMX_DEPTH)
    for (long n = 0; n < N; n += 32)  // this part of B's half panel stays in the first cache while A's rows pass
      for (long m = 0; m < M; m += 32) {
        const long depth = std::min(AMX_DEPTH, words - w);
        const uint32_t* next = (n + 32 < N ? B + w * 64 + n + 32 : B + (w + depth) * 64) + m / 32 * rows_ahead * 64;
        const auto part = [](long left) { return std::min(16L, std::max(0L, left)); };
        const AmxShape shape = {{part(M - m), part(M - m - 16)}, {part(N - n), part(N - n - 16)}};
        if (shape != now) amx_configure(now = shape);
        const auto block = shape.rows[1]
                               ? (shape.columns[1] ? amx_block<WORDS, true, true> : amx_block<WORDS, true, false>)
                               : (shape.columns[1] ? amx_block<WORDS, false, true> : amx_block<WORDS, false, false>);
        block(depth, A + m * a_stride + w, a_stride, B + w * 64 + n, last + n, C + m * ldc + n, ldc, add || w > 0, next,
              rows_ahead);
      }
  _tile_release();
}

// C[M, N <= 64] (+)= A B of bfloat16 pairs. Denormal numbers count as zero. The tiles are configured and released here,
// since others in the process use them too.
static inline void amx_bf16_tiles(long M, long pairs, const uint32_t* A, long a_stride, const uint32_t* B, float* C,
                                  long ldc, long N, bool add) {
  amx_tiles<AmxWords::bf16>(M, pairs, A, a_stride, B, (uint32_t*)C, ldc, N, add);
}
// The same of int8 quads, both signed, into int32: exact (modulo 2^32).
static inline void amx_int8_tiles(long M, long quads, const uint32_t* A, long a_stride, const uint32_t* B, int32_t* C,
                                  long ldc, long N, bool add) {
  amx_tiles<AmxWords::int8>(M, quads, A, a_stride, B, (uint32_t*)C, ldc, N, add);
}
#pragma GCC pop_options
