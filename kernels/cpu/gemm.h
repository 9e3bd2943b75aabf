// Matrix products in bfloat16 with float32 sums: packing, tiles, and the loops over blocks; see gemm.cc.
//
// Both operands are packed as words of two bfloat16, (k, k + 1) of the inner dimension: A as rows, B as panels of 64
// columns. A tile of C is 6 x 64 in registers (vdpbf16ps), or 32 x 32 in AMX tiles. One thread computes each block of
// C, with sums in order of k: the bits do not depend on the number of threads. Included after amx.h, under a target
// pragma and in a namespace.

constexpr long NR = 64, MR = 6;     // columns of a panel; rows of a tile
constexpr long MC = 96, GROUP = 8;  // rows and panels of a block of C, which stays in the second-level cache (192 KB)
constexpr long DEPTH = 512;         // words of the inner dimension of a block: a panel is 128 KB
constexpr long PACKED = 1 << 20;    // words of B that are packed at once (4 MB)

// rows x cols; element (r, c) is data[r * stride + c] or, if column_major, data[c * stride + r]; float32, or bfloat16
// if half.
struct Matrix {
  const void* data;
  long rows, cols, stride;
  bool column_major, half;
  const float* single(long r, long c) const {
    return (const float*)data + (column_major ? c * stride + r : r * stride + c);
  }
  const uint16_t* bits(long r, long c) const {
    return (const uint16_t*)data + (column_major ? c * stride + r : r * stride + c);
  }
  Matrix transposed() const { return {data, cols, rows, stride, !column_major, half}; }
};

// Memory of products, kept for the next one of about this size: fresh pages would cost as long as packing into them.
struct Words {
  uint32_t* at = nullptr;
  size_t size = 0;
  explicit Words(size_t n = 0) : size((n * 4 + 63) / 64 * 64) {
    if (!size) return;
    for (auto& [spare, of] : kept())
      if (spare && of >= size && of / 2 <= size) {
        std::swap(at, spare), size = of;
        return;
      }
    at = (uint32_t*)std::aligned_alloc(64, size);
  }
  Words(Words&& other) { *this = std::move(other); }
  Words& operator=(Words&& other) { return std::swap(at, other.at), std::swap(size, other.size), *this; }
  ~Words() {
    auto& [spare, of] = kept()[turn()++ % KEPT];
    std::free(spare), spare = at, of = size;
  }
  uint32_t* get() const { return at; }

 private:
  static constexpr int KEPT = 4;
  struct Spare {
    uint32_t* at = nullptr;
    size_t size = 0;
  };
  struct Spares : std::array<Spare, KEPT> {
    ~Spares() {
      for (Spare& each : *this) std::free(each.at);
    }
  };
  static Spares& kept() {
    static thread_local Spares spares;
    return spares;
  }
  static unsigned& turn() {
    static thread_local unsigned next = 0;
    return next;
  }
};
static Words words(size_t n) { return Words(n); }

static long up(long n, long unit) { return (n + unit - 1) / unit * unit; }
static long inner_words(long K) { return up(K, 32) / 2; }  // words of a row, whole cache lines
// From one row to the next: an odd number of cache lines, so that 16 rows do not share a set of the first-level cache.
static long row_stride(long words) { return words | 16; }
static INLINE __mmask16 first(long n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : (1u << n) - 1; }

// ------------------------------------------------------------------------------------------------- packing

static INLINE __m512i pairs(__m512 even, __m512 odd) {
  const __m512i a = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(even)),
                b = _mm512_cvtepu16_epi32((__m256i)_mm512_cvtneps_pbh(odd));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}
// Elements (r … r + 15, c) and (r … r + 15, c + 1) of a column-major matrix as 16 words; zeros past its end.
static INLINE __m512i across(const Matrix& x, long r, long c) {
  const __mmask16 keep = first(x.rows - r), odd = c + 1 < x.cols ? keep : 0;
  if (c >= x.cols || !keep) return _mm512_setzero_si512();
  if (!x.half)
    return pairs(_mm512_maskz_loadu_ps(keep, x.single(r, c)), _mm512_maskz_loadu_ps(odd, x.single(r, c) + x.stride));
  const __m512i a = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(keep, x.bits(r, c))),
                b = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(odd, x.bits(r, c) + x.stride));
  return _mm512_or_si512(a, _mm512_slli_epi32(b, 16));
}
// Elements (r, c … c + 31) of a row-major matrix as 16 words; zeros past its end.
static INLINE __m512i along(const Matrix& x, long r, long c) {
  const long n = x.cols - c;
  if (r >= x.rows || n <= 0) return _mm512_setzero_si512();
  if (x.half) return _mm512_maskz_loadu_epi16(n >= 32 ? ~0u : (1u << n) - 1, x.bits(r, c));
  return (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(first(n - 16), x.single(r, c) + 16),
                                      _mm512_maskz_loadu_ps(first(n), x.single(r, c)));
}

static INLINE void transpose16(__m512i* a) {
  __m512i b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++)
    b[2 * i] = _mm512_unpacklo_epi32(a[2 * i], a[2 * i + 1]),
          b[2 * i + 1] = _mm512_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    a[4 * i] = _mm512_unpacklo_epi64(b[4 * i], b[4 * i + 2]),
          a[4 * i + 1] = _mm512_unpackhi_epi64(b[4 * i], b[4 * i + 2]);
    a[4 * i + 2] = _mm512_unpacklo_epi64(b[4 * i + 1], b[4 * i + 3]),
              a[4 * i + 3] = _mm512_unpackhi_epi64(b[4 * i + 1], b[4 * i + 3]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    b[i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0x88), b[4 + i] = _mm512_shuffle_i32x4(a[i], a[4 + i], 0xdd);
    b[8 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0x88),
          b[12 + i] = _mm512_shuffle_i32x4(a[8 + i], a[12 + i], 0xdd);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++) {
    a[i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0x88), a[8 + i] = _mm512_shuffle_i32x4(b[i], b[8 + i], 0xdd);
    a[4 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0x88),
          a[12 + i] = _mm512_shuffle_i32x4(b[4 + i], b[12 + i], 0xdd);
  }
}
template <class Load>
static INLINE void transposed16(uint32_t* out, long stride, Load load) {  // out[j][i] = load(i)[j]
  __m512i block[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) block[i] = load(i);
  transpose16(block);
#pragma GCC unroll 16
  for (int i = 0; i < 16; i++) _mm512_storeu_si512(out + i * stride, block[i]);
}

// Rows [r0, r1) of x, all columns, to out[row][word], `stride` words a row; the number of rows is padded to 16.
static void pack_rows(const Matrix& x, long r0, long r1, uint32_t* out, long stride) {
  const long count = inner_words(x.cols);
  if (!x.column_major) {
    for (long r = r0; r < r1; r++)
      for (long w = 0; w < count; w += 16) _mm512_storeu_si512(out + (r - r0) * stride + w, along(x, r, 2 * w));
    return;
  }
  for (long r = r0; r < r1; r += 16)
    for (long w = 0; w < count; w += 16)
      transposed16(out + (r - r0) * stride + w, stride, [&](int i) { return across(x, r, 2 * (w + i)); });
}
// Columns [c, c + 64) of x, all rows, to out[word][64]; zeros past its end.
static void pack_panel(const Matrix& x, long c, uint32_t* out) {
  const long count = inner_words(x.rows);
  const Matrix t = x.transposed();
  if (!x.column_major) {
    for (long w = 0; w < count; w++)
#pragma GCC unroll 4
      for (long n = 0; n < NR; n += 16) _mm512_storeu_si512(out + w * NR + n, across(t, c + n, 2 * w));
    return;
  }
  for (long n = 0; n < NR; n += 16) {
    for (long w = 0; w < count; w += 16)
      transposed16(out + w * NR + n, NR, [&](int i) { return along(t, c + n + i, 2 * w); });
  }
}

// --------------------------------------------------------------------------------------------------- tiles

template <int M, int V>
static INLINE void half_tile(long count, const uint32_t* A, long a_stride, const uint32_t* B, float* C, long ldc,
                             long N, bool add, long ahead = 0) {  // ahead: words of B that are fetched meanwhile
  __m512 c[M][V];
  __mmask16 keep[V];
#pragma GCC unroll 4
  for (int n = 0; n < V; n++) keep[n] = first(N - 16 * n);
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < V; n++)
      c[m][n] = add ? _mm512_maskz_loadu_ps(keep[n], C + m * ldc + 16 * n) : _mm512_setzero_ps();
  for (long p = 0; p < count; p++) {
    __m512bh b[V];
#pragma GCC unroll 4
    for (int n = 0; n < V; n++) b[n] = (__m512bh)_mm512_load_si512(B + p * NR + 16 * n);
    if (ahead)
#pragma GCC unroll 4
      for (int n = 0; n < V; n++) __builtin_prefetch(B + p * NR + 16 * n + ahead);
#pragma GCC unroll 8
    for (int m = 0; m < M; m++) {
      const __m512bh a = (__m512bh)_mm512_set1_epi32((int)A[m * a_stride + p]);
#pragma GCC unroll 4
      for (int n = 0; n < V; n++) c[m][n] = _mm512_dpbf16_ps(c[m][n], a, b[n]);
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < V; n++) _mm512_mask_storeu_ps(C + m * ldc + 16 * n, keep[n], c[m][n]);
}

template <int V>
static void tiles_of(long M, long count, const uint32_t* A, long a_stride, const uint32_t* B, float* C, long ldc,
                     long N, bool add) {
  long m = 0;
  for (; m + MR <= M; m += MR) half_tile<MR, V>(count, A + m * a_stride, a_stride, B, C + m * ldc, ldc, N, add);
  for (; m + 2 <= M; m += 2) half_tile<2, V>(count, A + m * a_stride, a_stride, B, C + m * ldc, ldc, N, add);
  if (m < M) half_tile<1, V>(count, A + m * a_stride, a_stride, B, C + m * ldc, ldc, N, add);
}
// C (M, N) (+)= A B for M <= 96 rows of packed A and one panel of packed B, N <= 64.
static void tiles(long M, long count, const uint32_t* A, long a_stride, const uint32_t* B, float* C, long ldc, long N,
                  bool add) {
  if (amx_bf16_ready()) amx_bf16_tiles(M, count, A, a_stride, B, C, ldc, N, add);
  else if (N <= 16) tiles_of<1>(M, count, A, a_stride, B, C, ldc, N, add);
  else if (N <= 32) tiles_of<2>(M, count, A, a_stride, B, C, ldc, N, add);
  else tiles_of<4>(M, count, A, a_stride, B, C, ldc, N, add);
}

// --------------------------------------------------------------------------------------------------- loops

// Packed rows of A: `rows` rows of `stride` words.
struct Rows {
  const uint32_t* at;
  long rows, stride;
};
static Rows pack_all(const Matrix& x, uint32_t* out, long stride) {  // out: up(x.rows, 16) * stride words
  parallel((x.rows + MC - 1) / MC, [&](long block) {
    pack_rows(x, block * MC, std::min(x.rows, (block + 1) * MC), out + block * MC * stride, stride);
  });
  return {out, x.rows, stride};
}

// C (m1 - m0, N) (+)= words [k0, k1) of the inner dimension.
static void block_of(const Rows& A, long m0, long m1, const uint32_t* panels, long count, long k0, long k1, long N,
                     float* C, long ldc, bool add) {
  for (long n = 0; n < N; n += NR)
    tiles(m1 - m0, k1 - k0, A.at + m0 * A.stride + k0, A.stride, panels + n * count + k0 * NR, C + n, ldc,
          std::min(NR, N - n), add);
}
static long depth_of(long count) {
  const long blocks = (count + DEPTH - 1) / DEPTH;
  return up((count + blocks - 1) / blocks, 16);
}

// C (A.rows, N) (+)= A B for packed panels of `count` words. The thread that computed a block of C then calls
// finish(m0, m1, n0, n1) for it. Blocks that follow each other share their part of the panels, at most 1 MB, which
// stays in the second-level cache; so does a block's sum, until it is written to C in long rows.
template <class Finish>
static void multiply(const Rows& A, long N, long count, const uint32_t* panels, float* C, long ldc, bool add,
                     Finish finish) {
  constexpr long WIDE = GROUP * NR + 16;  // not a power of two
  const long groups = (N + GROUP * NR - 1) / (GROUP * NR), down = (A.rows + MC - 1) / MC, depth = depth_of(count);
  for (long k = 0; k < count; k += depth)
    parallel(down * groups, [&](long task) {
      static thread_local Words room(MC * WIDE);
      const long m0 = task % down * MC, m1 = std::min(A.rows, m0 + MC), n0 = task / down * GROUP * NR,
                 n1 = std::min(N, n0 + GROUP * NR), k1 = std::min(count, k + depth);
      // Tiles would write single lines, far apart; other instructions write rows, and need no copy.
      const bool copies = amx_bf16_ready();
      float* block = copies ? (float*)room.get() : C + m0 * ldc + n0;
      block_of(A, m0, m1, panels + n0 * count, count, k, k1, n1 - n0, block, copies ? WIDE : ldc,
               !copies && (add || k > 0));
      for (long m = m0; copies && m < m1; m++)
        for (long n = n0; n < n1; n += 16) {
          const __mmask16 keep = first(n1 - n);
          float* to = C + m * ldc + n;
          const __m512 sum = _mm512_load_ps(block + (m - m0) * WIDE + n - n0);
          _mm512_mask_storeu_ps(to, keep, add || k > 0 ? _mm512_add_ps(sum, _mm512_maskz_loadu_ps(keep, to)) : sum);
        }
      if (k1 == count) finish(m0, m1, n0, n1);
    });
}
// The same; pack(column, out) packs a panel of B.
template <class Pack, class Finish>
static void product(const Rows& A, long N, long count, Pack pack, float* C, long ldc, bool add, Finish finish) {
  const long most = std::max(NR, PACKED / count / NR * NR), width = std::min(most, up(N, NR));
  const Words panels = words(width * count);
  for (long n0 = 0; n0 < N; n0 += width) {
    const long n_of = std::min(width, N - n0);
    parallel((n_of + NR - 1) / NR, [&](long p) { pack(n0 + p * NR, panels.get() + p * NR * count); });
    multiply(A, n_of, count, panels.get(), C + n0, ldc, add,
             [&](long m0, long m1, long from, long to) { finish(m0, m1, n0 + from, n0 + to); });
  }
}
static void nothing(long, long, long, long) {}
