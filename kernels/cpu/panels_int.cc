// Packed weights in 8 and 4 bits (see panels.h) with the products of int8.h: x is rounded to int8, sums are exact.
//
// INT8 codes are kept unsigned, as vpdpbusd wants them, or signed where AMX takes them. INT4 codes are unpacked, one
// block at a time, into the first-level cache: 0 … 15 is the same signed and unsigned.
#include "int8.h"

#include "panels.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512vnni")
namespace {
long quads(long rows) { return (rows + 3) / 4; }
long words_of(const Panels& w) { return w.storage == INT4 ? (w.in + 7) / 8 : quads(w.in); }  // of a column
long row_words(const Panels& w) { return ((w.in + 7) / 8 * 2 + 15) / 16 * 16 | 16; }         // of x, see row_stride()

// Eight rows of codes a word -> two rows of quads: `pairs` rows of 64 words.
void unpack(const uint32_t* from, long pairs, uint32_t* to) {
  const __m512i low = _mm512_set1_epi8(15);
  for (long i = 0; i < pairs; i++, from += 64, to += 128)
#pragma GCC unroll 4
    for (int n = 0; n < 64; n += 16) {
      const __m512i v = _mm512_load_si512(from + n);
      __builtin_prefetch(from + n + 1024);
      _mm512_store_si512(to + n, _mm512_and_si512(v, low));
      _mm512_store_si512(to + 64 + n, _mm512_and_si512(_mm512_srli_epi16(v, 4), low));
    }
}

// c (M, 64) of a whole panel of four-bit codes for one or two rows; up to six come in pairs, since the panel is in the
// cache then. Codes are not unpacked into memory, and sums stay in registers. An upper half counts 16 times what it
// says, which is divided out once a block.
template <int M>
void four_bit_panel(const Panels& w, const Inputs& x, long row, long panel, float* c, long ldc) {
  const __m512i low = _mm512_set1_epi8(15), high = _mm512_set1_epi8((char)0xF0);
  const long blocks = w.blocks(), grouped = w.groups() > 1;
  const uint32_t* b = (const uint32_t*)w.data.get() + panel * words_of(w) * 64;
  const uint32_t* a = x.words + row * x.stride;
  __m512 total[M][4] = {};
  for (long block = 0; block < blocks; block++) {
    const long k = block * w.block, pairs = (std::min(w.block, w.in - k) + 7) / 8;
    __m512i lower[M][4] = {}, upper[M][4] = {};
    for (long i = 0; i < pairs; i++, b += 64) {
      __m512i v[4];
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) v[n] = _mm512_load_si512(b + 16 * n);
#pragma GCC unroll 2
      for (int m = 0; m < M; m++) {
        const uint32_t* at = a + m * x.stride + k / 4 + 2 * i;
        const __m512i first = _mm512_set1_epi32((int)at[0]), second = _mm512_set1_epi32((int)at[1]);
#pragma GCC unroll 4
        for (int n = 0; n < 4; n++) {
          lower[m][n] = _mm512_dpbusd_epi32(lower[m][n], _mm512_and_si512(v[n], low), first);
          upper[m][n] = _mm512_dpbusd_epi32(upper[m][n], _mm512_and_si512(v[n], high), second);
        }
      }
      __builtin_prefetch(b + 1024);
      __builtin_prefetch(b + 1040);
      __builtin_prefetch(b + 1056);
      __builtin_prefetch(b + 1072);
    }
    const long at = w.at(panel, grouped ? k / w.group : 0);
#pragma GCC unroll 2
    for (int m = 0; m < M; m++) {
      const long i = (row + m) * blocks + block;
      const __m512i less = _mm512_set1_epi32(w.zero * x.sums[i]);
      const __m512 sum = _mm512_set1_ps((float)x.sums[i]), scale = _mm512_set1_ps(x.scales[i]);
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) {
        const __m512i all = _mm512_add_epi32(lower[m][n], _mm512_srai_epi32(upper[m][n], 4));
        __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(all, less));
        if (!w.zeros.empty()) y = _mm512_sub_ps(y, _mm512_mul_ps(_mm512_loadu_ps(&w.zeros[at + 16 * n]), sum));
        if (grouped) y = _mm512_mul_ps(y, _mm512_loadu_ps(&w.scales[at + 16 * n]));
        total[m][n] = _mm512_fmadd_ps(y, scale, total[m][n]);
      }
    }
  }
#pragma GCC unroll 2
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < 4; n++) _mm512_storeu_ps(c + m * ldc + 16 * n, total[m][n]);
}

// c (rows, 32) (+)= (sums - zero sum of x) scale of x [scale of W], as four_bit_panel rounds it; scales may be null.
template <bool ZEROS>
void scale_block(const int32_t* sums, long rows, long zero, const int* x_sums, const float* x_scales, long blocks,
                 const float* scales, const float* zeros, float* c, long ldc, bool add) {
  __m512 by[2], off[2];
  for (int n = 0; n < 2; n++) {
    by[n] = scales ? _mm512_loadu_ps(scales + 16 * n) : _mm512_set1_ps(1.0f);
    off[n] = ZEROS ? _mm512_loadu_ps(zeros + 16 * n) : _mm512_setzero_ps();
  }
  for (long m = 0; m < rows; m++, sums += 32, c += ldc) {
    const int sum = x_sums[m * blocks];
    const __m512i less = _mm512_set1_epi32((int)zero * sum);
    const __m512 scale = _mm512_set1_ps(x_scales[m * blocks]);
#pragma GCC unroll 2
    for (int n = 0; n < 2; n++) {
      __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums + 16 * n), less));
      if (ZEROS) y = _mm512_sub_ps(y, _mm512_mul_ps(off[n], _mm512_set1_ps((float)sum)));
      const __m512 before = add ? _mm512_loadu_ps(c + 16 * n) : _mm512_setzero_ps();
      _mm512_storeu_ps(c + 16 * n, _mm512_fmadd_ps(_mm512_mul_ps(y, by[n]), scale, before));
    }
  }
}

// c (+)= (sums - zero sum of x) scale of x [scale of W], 64 columns; zeros and scales may be null.
void scale_row(const int32_t* sums, int less, float x_sum, float x_scale, const float* scales, const float* zeros,
               float* c, bool add) {
#pragma GCC unroll 4
  for (int n = 0; n < 64; n += 16) {
    __m512 y = _mm512_cvtepi32_ps(_mm512_sub_epi32(_mm512_load_si512(sums + n), _mm512_set1_epi32(less)));
    if (zeros) y = _mm512_sub_ps(y, _mm512_mul_ps(_mm512_loadu_ps(zeros + n), _mm512_set1_ps(x_sum)));
    if (scales) y = _mm512_mul_ps(y, _mm512_loadu_ps(scales + n));
    const __m512 before = add ? _mm512_loadu_ps(c + n) : _mm512_setzero_ps();
    _mm512_storeu_ps(c + n, _mm512_fmadd_ps(y, _mm512_set1_ps(x_scale), before));  // as four_bit_panel rounds it
  }
}

#pragma GCC push_options
#pragma GCC target("amx-tile,amx-int8")
// The sums of blocks of x and W, on tiles. The products of 32 x 32 of C run while the sums before them are scaled.
void sums_on_tiles(const Panels& w, const Inputs& x, long m0, long m1, long panel, float* c, long ldc) {
  alignas(64) uint32_t padded[32 * 64];  // a block has at most 32 quads
  alignas(64) int32_t sums[2][32 * 32];
  const long blocks = w.blocks(), rows = m1 - m0;
  const uint32_t* of_panel = (const uint32_t*)w.data.get() + panel * words_of(w) * 64;
  const auto scale = w.zeros.empty() ? scale_block<false> : scale_block<true>;
  struct {
    long block, m, n;
    const int32_t* sums = nullptr;
  } last;
  const auto scale_last = [&] {
    if (!last.sums) return;
    const long i = (m0 + last.m) * blocks + last.block, at = w.at(panel, last.block * w.block / w.group) + last.n;
    scale(last.sums, std::min(32L, rows - last.m), w.zero, x.sums + i, x.scales + i, blocks,
          w.groups() > 1 ? &w.scales[at] : nullptr, w.zeros.empty() ? nullptr : &w.zeros[at],
          c + last.m * ldc + last.n, ldc, last.block > 0);
  };
  amx_configure({{16, 16}, {16, 16}});  // rows of x are padded to 16
  for (long b = 0, turn = 0; b < blocks; b++) {
    const long from = b * w.block / 4, count = quads(std::min(w.block, w.in - b * w.block)), full = (count + 15) & ~15;
    const uint32_t* B = of_panel + from * 64;
    if (w.storage == INT4) unpack(of_panel + from / 2 * 64, (count + 1) / 2, padded);
    else if (count < full) std::copy_n(B, count * 64, padded);
    if (w.storage == INT4 || count < full) {  // behind a block, x has the codes of the next: W must be zero there
      const long written = w.storage == INT4 ? (count + 1) / 2 * 2 : count;
      std::fill(padded + written * 64, padded + full * 64, 0);
      B = padded;
    }
    asm volatile("" ::: "memory");  // before tiles are loaded
    for (long n = 0; n < 64; n += 32)
      for (long m = 0; m < rows; m += 32, turn ^= 1) {
        const bool tall = rows - m > 16;
        const uint32_t* A = x.words + (m0 + m) * x.stride + from;
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
        for (long q = 0; q < full; q += 16) {
          if (m == 0 && B != padded)  // few rows are bound by reading B; unpack() has its own
            for (long k = q + AMX_AHEAD; k < q + AMX_AHEAD + 16; k++)
              __builtin_prefetch(B + k * 64 + n), __builtin_prefetch(B + k * 64 + n + 16);
          _tile_loadd(4, A + q, 4 * x.stride);
          _tile_loadd(6, B + q * 64 + n, 256);
          _tile_dpbssd(0, 4, 6);
          _tile_loadd(7, B + q * 64 + n + 16, 256);
          _tile_dpbssd(1, 4, 7);
          if (!tall) continue;
          _tile_loadd(5, A + 16 * x.stride + q, 4 * x.stride);
          _tile_dpbssd(2, 5, 6);
          _tile_dpbssd(3, 5, 7);
        }
        scale_last();
        last = {b, m, n, sums[turn]};
        _tile_stored(0, sums[turn], 128);
        _tile_stored(1, sums[turn] + 16, 128);
        if (!tall) continue;
        _tile_stored(2, sums[turn] + 16 * 32, 128);
        _tile_stored(3, sums[turn] + 16 * 32 + 16, 128);
      }
  }
  scale_last();
  _tile_release();
}
#pragma GCC pop_options
}  // namespace
#pragma GCC pop_options

void pack_codes(const Source& from, Panels& w) {
  const bool four = w.storage == INT4, is_signed = !four && amx_int8_ready();
  const long words = words_of(w), per_word = four ? 8 : 4;
  const uint8_t *x = (const uint8_t*)from.data, flip = is_signed ? 0x80 : 0;
  w.zero = w.zeros.empty() ? (four ? 8 : is_signed ? 0 : 128) : 0;
  if (is_signed)
    for (float& zero : w.zeros) zero -= 128.0f;
  w.data = weight_buffer(w.panels() * words * 64 * 4);
  parallel(w.panels(), [&](long p) {
    uint32_t* to = (uint32_t*)w.data.get() + p * words * 64;
    for (long i = 0; i < words; i++)
      for (long n = 0; n < 64; n++, to++) {
        *to = 0;
        for (long j = 0; j < per_word; j++) {
          const long k = i * per_word + j, c = p * 64 + n;
          if (k >= w.in || c >= w.out) continue;
          const uint32_t code = (uint8_t)(x[k * w.out + c] ^ flip);
          *to |= four ? code << (j < 4 ? 8 * j : 8 * (j - 4) + 4) : code << (8 * j);
        }
      }
  });
}

Inputs prepare_codes(const Panels& w, const float* x, long rows, InputRoom& room) {
  const long blocks = w.blocks();
  Inputs in;
  in.rows = rows, in.stride = row_words(w);
  uint32_t* words = room.words.get<uint32_t>((rows + 15) / 16 * 16 * in.stride);
  float* scales = room.scales.get<float>(rows * blocks);
  int* sums = room.sums.get<int>(rows * blocks);
  const auto round = [&](long m) {
    static thread_local std::vector<float> moved;
    const float* from = x + m * w.in;
    if (!w.order.empty()) {
      moved.resize(w.in);
      for (long k = 0; k < w.in; k++) moved[k] = from[w.order[k]];
      from = moved.data();
    }
    for (long b = 0; b < blocks; b++) {
      const long k = b * w.block, n = std::min(w.block, w.in - k), width = b + 1 < blocks ? n : 4 * in.stride - k;
      scales[m * blocks + b] =
          wide::round_to_int8(from + k, n, width, w.input_scale ? &w.input_scale : nullptr,
                              (int8_t*)(words + m * in.stride) + k, &sums[m * blocks + b]);
    }
  };
  if (rows <= 8)
    for (long m = 0; m < rows; m++) round(m);
  else parallel(rows, round);
  in.words = words, in.scales = scales, in.sums = sums;
  return in;
}

void sums_codes(const Panels& w, const Inputs& x, long m0, long m1, long panel, float* c, long ldc) {
  constexpr long PART = 32;  // quads of a panel at a time: 8 KB
  alignas(64) uint32_t unpacked[PART * 64];
  alignas(64) int32_t sums[96 * 64];
  const long rows = m1 - m0, blocks = w.blocks();
  if (w.storage == INT4 && rows <= 6) {
    for (long m = 0; m + 1 < rows; m += 2) four_bit_panel<2>(w, x, m0 + m, panel, c + m * ldc, ldc);
    if (rows % 2) four_bit_panel<1>(w, x, m1 - 1, panel, c + (rows - 1) * ldc, ldc);
    return;
  }
  const bool tiles = rows >= 7 && amx_int8_ready(), is_signed = w.storage == INT8 && amx_int8_ready();
  if (tiles && w.block <= 128) return sums_on_tiles(w, x, m0, m1, panel, c, ldc);
  const uint32_t* of_panel = (const uint32_t*)w.data.get() + panel * words_of(w) * 64;
  for (long b = 0; b < blocks; b++) {
    const long from = b * w.block / 4, to = quads(std::min(w.in, (b + 1) * w.block));
    const long part = (rows > 6 && !tiles) || w.storage == INT4 ? PART : to - from;
    const uint32_t* A = x.words + m0 * x.stride;
    for (long q = from; q < to; q += part) {
      const long n = std::min(part, to - q);
      const uint32_t* at = of_panel + q * 64;
      if (w.storage == INT4) unpack(of_panel + q / 2 * 64, (n + 1) / 2, unpacked), at = unpacked;
      const long ahead = w.storage == INT4 ? 0 : PART * 64;
      if (tiles) amx_int8_tiles(rows, n, A + q, x.stride, at, sums, 64, 64, q > from);
      else if (is_signed) int8::quad_tiles<true>(rows, n, A + q, x.stride, at, sums, 64, q > from, ahead);
      else int8::quad_tiles<false>(rows, n, A + q, x.stride, at, sums, 64, q > from, ahead);
    }
    const float *scales = nullptr, *zeros = nullptr;
    const long at = w.at(panel, b * w.block / w.group);
    if (w.groups() > 1) scales = &w.scales[at];
    if (!w.zeros.empty()) zeros = &w.zeros[at];
    for (long m = 0; m < rows; m++) {
      const long i = (m0 + m) * blocks + b, zero = w.zero + (is_signed && !tiles ? 128 : 0);
      scale_row(sums + m * 64, (int)zero * x.sums[i], (float)x.sums[i], x.scales[i], scales, zeros, c + m * ldc, b > 0);
    }
  }
}
