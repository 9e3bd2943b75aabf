// Attention over a paged cache, and writing it; see paged.cc. Included once per instruction set after simd.h.

constexpr long CHUNK = 256;  // keys per decode task
constexpr long ROWS = 64;    // (query, head) rows per prefill task
constexpr long KEYS = 64;    // keys per step of a prefill task

static INLINE vf widen(const float* p) { return load(p); }
static INLINE vf widen(const int8_t* p) {  // intrinsics: GCC's __builtin_convertvector converts one value at a time
#if VL == 16
  return (vf)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
#elif VL == 8
  return (vf)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)));
#else
  int word;
  std::memcpy(&word, p, sizeof(word));
  __m128i x = _mm_cvtsi32_si128(word);
  x = _mm_unpacklo_epi8(x, x), x = _mm_unpacklo_epi16(x, x);  // each byte four times; the highest one is used
  return (vf)_mm_cvtepi32_ps(_mm_srai_epi32(x, 24));
#endif
}
static INLINE vf widen(const uint16_t* p) {  // bfloat16: the upper half of a float
#if VL == 16
  return (vf)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)), 16);
#elif VL == 8
  return (vf)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
#else
  return (vf)_mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
#endif
}
template <class T>
static INLINE vf widen_part(const T* p,
                            long n) {  // the first n values, then zeros: what follows may belong to others
  T x[VL] = {};
  std::memcpy(x, p, n * sizeof(T));
  return widen(x);
}
template <class T>
static INLINE vf widen_at(const T* p, long d, long Dh) {
  return d + VL <= Dh ? widen(p + d) : widen_part(p + d, Dh - d);
}

static INLINE long padded(long Dh) { return (Dh + VL - 1) / VL * VL; }

static INLINE void transpose(vf (&x)[VL]) {
#pragma GCC unroll 4
  for (int s = 1; s < VL; s *= 2) {  // swap the blocks of s x s beside the diagonal
    vi low, high;
#pragma GCC unroll 16
    for (int j = 0; j < VL; j++) low[j] = j & s ? VL + j - s : j, high[j] = j & s ? VL + j : j + s;
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++)
      if (!(i & s)) {
        const vf a = x[i], b = x[i + s];
        x[i] = __builtin_shuffle(a, b, low), x[i + s] = __builtin_shuffle(a, b, high);
      }
  }
}

// Lane i of the result is the sum of part[i]: adjacent lanes are added, log2(VL) times.
static INLINE vf sums_of(vf (&part)[VL]) {
  vi even, odd;
#pragma GCC unroll 16
  for (int i = 0; i < VL; i++) even[i] = 2 * i, odd[i] = 2 * i + 1;
#pragma GCC unroll 4
  for (int left = VL; left > 1; left /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < left / 2; i++) {
      const vf a = part[2 * i], b = part[2 * i + 1];
      part[i] = __builtin_shuffle(a, b, even) + __builtin_shuffle(a, b, odd);
    }
  return part[0];
}

// out[g] += sum over keys of p[g][j] v[j] for HEADS heads and N vectors of the head dim, the last one of n values.
template <int HEADS, int N, class T>
static INLINE void weigh(const float* p, const T* const* v, long keys, long d, long n, float* out, long ldo) {
  vf acc[HEADS][N];
#pragma GCC unroll 4
  for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) acc[g][i] = load(out + g * ldo + d + i * VL);
  for (long j = 0; j < keys; j++) {
    const T* row = v[j] + d;
    vf x[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) x[i] = i < N - 1 || n == VL ? widen(row + i * VL) : widen_part(row + i * VL, n);
#pragma GCC unroll 4
    for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
      for (int i = 0; i < N; i++) acc[g][i] += p[g * CHUNK + j] * x[i];
  }
#pragma GCC unroll 4
  for (int g = 0; g < HEADS; g++)
#pragma GCC unroll 4
    for (int i = 0; i < N; i++) store(out + g * ldo + d + i * VL, acc[g][i]);
}
template <int HEADS, class T>
static INLINE void weigh_all(const float* p, const T* const* v, long keys, long Dh, float* out, long ldo) {
  long d = 0;
  for (; d + 4 * VL <= Dh; d += 4 * VL) weigh<HEADS, 4>(p, v, keys, d, VL, out, ldo);
  for (; d + 2 * VL <= Dh; d += 2 * VL) weigh<HEADS, 2>(p, v, keys, d, VL, out, ldo);
  for (; d < Dh; d += VL) weigh<HEADS, 1>(p, v, keys, d, std::min((long)VL, Dh - d), out, ldo);
}

// Scores of VL keys for one head: lane i is q k[i].
template <class T>
static INLINE vf scores_of(const float* q, const T* const* k, long Dh) {
  vf part[VL] = {};
  long d = 0;
  for (; d + VL <= Dh; d += VL) {
    const vf y = load(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) part[i] += y * widen(k[i] + d);
  }
  if (d < Dh) {
    const vf y = load(q + d);
#pragma GCC unroll 16
    for (int i = 0; i < VL; i++) part[i] += y * widen_part(k[i] + d, Dh - d);
  }
  return sums_of(part);
}

// p[0 … width) becomes exp(p - its maximum), zeros up to `whole`.
static INLINE void exponentials(float* p, long width, long whole, float* most, float* sum) {
  for (long j = width; j < whole; j++) p[j] = -INFINITY;
  vf m = load(p), total = {};
  for (long j = VL; j < whole; j += VL) m = vmax(m, load(p + j));
  *most = hmax(m);
  for (long j = 0; j < whole; j += VL) {
    const vf x = vexp(load(p + j) - *most);
    store(p + j, x);
    total += x;
  }
  *sum = hsum(total);
}

// One query of sequence s, keys [j0, j1), key/value heads [kv0, kv1) and all heads that read them: out (heads, padded
// Dh), not yet divided by sum; results of key/value heads are `apart` from one another. A key's heads lie side by side
// in memory, so heads are the inner loop.
template <class T>
static void decode_chunk(const Paged& a, long s, long kv0, long kv1, long j0, long j1, float* outs, float* mosts,
                         float* sums, long apart) {
  const long Dh = a.Dh, Dp = padded(Dh), G = a.H / a.K, heads = kv1 - kv0, width = j1 - j0, stride = a.K * Dh;
  const T *k = (const T*)a.k + kv0 * Dh, *v = (const T*)a.v + kv0 * Dh;
  const float* of_s = a.q + (a.first[s] * a.H + kv0 * G) * Dh;
  static thread_local std::vector<float> room;
  room.resize(heads * G * (Dp + CHUNK));
  float *q = room.data(), *p = q + heads * G * Dp;  // (heads G, Dp), zeros where padded; (heads G, CHUNK)
  for (long g = 0; g < heads * G; g++)
    for (long d = 0; d < Dp; d++) q[g * Dp + d] = d < Dh ? of_s[g * Dh + d] * a.scale : 0.0f;
  long slot[CHUNK + VL];
  for (long j = 0; j < width; j++) slot[j] = a.slot(s, j0 + j);
  const long whole = padded(width);
  for (long j = width; j < whole; j++) slot[j] = slot[width - 1];  // past the end: the last key again
  const auto fetch = [&](const T* from, long j) __attribute__((always_inline)) {  // the same heads of a later group
    for (long i = j; i < std::min(j + VL, width); i++)
      for (long d = 0; d < Dh * (long)sizeof(T); d += 64)
        __builtin_prefetch((const char*)(from + slot[i] * stride) + d);
  };
  const T* row[VL];
  for (long j = 0; j < width; j += VL)
    for (long h = 0; h < heads; h++) {
      for (int i = 0; i < VL; i++) row[i] = k + slot[j + i] * stride + h * Dh;
      if (j + VL < width) fetch(k + h * Dh, j + VL);
      else fetch(v + h * Dh, 0);
      float scales[VL];
      if (a.k_scales)
        for (int i = 0; i < VL; i++) scales[i] = a.k_scales[slot[j + i] * a.K + kv0 + h];
      for (long g = 0; g < G; g++) {
        const vf x = scores_of(q + (h * G + g) * Dp, row, Dh);
        store(p + (h * G + g) * CHUNK + j, a.k_scales ? x * load(scales) : x);
      }
    }
  for (long h = 0; h < heads; h++)
    for (long g = 0; g < G; g++) {
      float* of = p + (h * G + g) * CHUNK;
      if (a.softcap)
        for (long j = 0; j < whole; j += VL) store(of + j, vtanh(load(of + j) * (1.0f / a.softcap)) * a.softcap);
      if (a.slopes)
        for (long j = 0; j < width; j++) of[j] -= a.slopes[(kv0 + h) * G + g] * (float)(a.contexts[s] - 1 - j0 - j);
      exponentials(of, width, whole, &mosts[h * apart * G + g], &sums[h * apart * G + g]);
      if (a.v_scales)
        for (long j = 0; j < width; j++) of[j] *= a.v_scales[slot[j] * a.K + kv0 + h];
      std::fill_n(outs + (h * apart * G + g) * Dp, Dp, 0.0f);
    }
  for (long j = 0; j < width; j += VL)
    for (long h = 0; h < heads; h++) {
      const long keys = std::min((long)VL, width - j);
      for (int i = 0; i < VL; i++) row[i] = v + slot[j + i] * stride + h * Dh;
      fetch(v + h * Dh, j + VL);
      const float* of = p + h * G * CHUNK + j;
      float* out = outs + h * apart * G * Dp;
      long g = 0;
      for (; g + 4 <= G; g += 4) weigh_all<4>(of + g * CHUNK, row, keys, Dh, out + g * Dp, Dp);
      for (; g + 2 <= G; g += 2) weigh_all<2>(of + g * CHUNK, row, keys, Dh, out + g * Dp, Dp);
      if (g < G) weigh_all<1>(of + g * CHUNK, row, keys, Dh, out + g * Dp, Dp);
    }
}

// Rows [r0, r0 + ROWS) of (query, head) of one key/value head of sequence s, over all keys that they see. Scores are
// (key, row), so that the softmax of many rows takes one vector operation per key.
template <class T>
static void prefill_tile(const Paged& a, long s, long kv, long r0) {
  const long Dh = a.Dh, Dp = padded(Dh), G = a.H / a.K, rows = std::min(ROWS, a.queries[s] * G - r0), N = padded(rows),
             stride = a.K * Dh;
  const long offset = a.contexts[s] - a.queries[s];
  std::vector<float> room(ROWS * Dp * 2 + KEYS * Dp * 2 + KEYS * ROWS + 4 * ROWS);
  float *qt = room.data(), *o = qt + ROWS * Dp, *k = o + ROWS * Dp, *v = k + KEYS * Dp, *p = v + KEYS * Dp,
        *most = p + KEYS * ROWS, *sum = most + ROWS, *shrink = sum + ROWS, *slope = shrink + ROWS;
  int last[ROWS];  // the last key that a row sees
  for (long r = 0; r < ROWS; r++) last[r] = offset + (r0 + std::min(r, rows - 1)) / G, most[r] = -INFINITY;
  for (long r = 0; r < rows; r++) slope[r] = a.slopes ? a.slopes[kv * G + (r0 + r) % G] : 0.0f;
  const auto place = [&](long r) { return ((a.first[s] + (r0 + r) / G) * a.H + kv * G + (r0 + r) % G) * Dh; };
  const auto fetch_keys = [&](long from) {  // rows lie far apart: the hardware does not foresee them
    for (long j = from; j < std::min(from + KEYS, last[rows - 1] + 1L); j++) {
      const long at = a.slot(s, j) * stride + kv * Dh;
      for (long d = 0; d < Dh * (long)sizeof(T); d += 64)
        for (const void* rows : {a.k, a.v}) __builtin_prefetch((const char*)((const T*)rows + at) + d);
    }
  };
  fetch_keys(a.seen_from(s, r0 / G));
  for (long r = 0; r < N; r += VL)
    for (long d = 0; d < Dh; d += VL) {
      vf x[VL];
      for (long i = 0; i < VL; i++) x[i] = r + i < rows ? widen_at(a.q + place(r + i), d, Dh) * a.scale : vf{};
      transpose(x);
      for (long i = 0; i < std::min((long)VL, Dh - d); i++) store(qt + (d + i) * ROWS + r, x[i]);
    }
  for (long j0 = a.seen_from(s, r0 / G); j0 <= last[rows - 1]; j0 += KEYS) {
    const long width = std::min(KEYS, last[rows - 1] + 1 - j0);
    for (long j = 0; j < width; j++) {
      const long at = a.slot(s, j0 + j);
      const T *kr = (const T*)a.k + at * stride + kv * Dh, *vr = (const T*)a.v + at * stride + kv * Dh;
      const float ks = a.k_scales ? a.k_scales[at * a.K + kv] : 1.0f,
                  vs = a.v_scales ? a.v_scales[at * a.K + kv] : 1.0f;
      for (long d = 0; d < Dh; d += VL)
        store(k + j * Dp + d, widen_at(kr, d, Dh) * ks), store(v + j * Dp + d, widen_at(vr, d, Dh) * vs);
    }
    fetch_keys(j0 + KEYS);
    if (j0 + KEYS > last[rows - 1])
      for (long r = 0; r < rows; r++)
        for (long d = 0; d < Dh; d += 16) __builtin_prefetch(a.out + place(r) + d, 1);
    small_gemm(width, N, Dh, k, Dp, 1, qt, ROWS, p, ROWS, false);
    bool scaled = false;
    for (long r = 0; r < N; r += VL) {
      vi sees;
      std::memcpy(&sees, last + r, sizeof(sees));
      if (a.softcap)
        for (long j = 0; j < width; j++)
          store(p + j * ROWS + r, vtanh(load(p + j * ROWS + r) * (1.0f / a.softcap)) * a.softcap);
      if (a.slopes)
        for (long j = 0; j < width; j++)
          store(p + j * ROWS + r,
                load(p + j * ROWS + r) - load(slope + r) * __builtin_convertvector(sees - (int)(j0 + j), vf));
      if (last[r + VL - 1] - a.window >= j0)
        for (long j = 0; j < width; j++)
          store(p + j * ROWS + r, sees - (int)a.window < (int)(j0 + j) ? load(p + j * ROWS + r) : splat(-INFINITY));
      if (j0 + width - 1 > last[r])
        for (long j = 0; j < width; j++)
          store(p + j * ROWS + r, sees >= (int)(j0 + j) ? load(p + j * ROWS + r) : splat(-INFINITY));
      const vf before = load(most + r);
      vf m = before, total = {};
      for (long j = 0; j < width; j++) m = vmax(m, load(p + j * ROWS + r));
      for (long j = 0; j < width; j++) {
        const vf x = vexp(load(p + j * ROWS + r) - m);
        store(p + j * ROWS + r, x);
        total += x;
      }
      const vf less = vexp(before - m);
      store(most + r, m), store(shrink + r, less), store(sum + r, load(sum + r) * less + total);
    }
    for (long r = 0; r < rows; r++) scaled |= shrink[r] != 1.0f;
    if (scaled)
      for (long r = 0; r < rows; r++)
        for (long d = 0; d < Dp; d += VL) store(o + r * Dp + d, load(o + r * Dp + d) * shrink[r]);
    small_gemm(rows, Dp, width, p, 1, ROWS, v, Dp, o, Dp, true);
  }
  for (long r = 0; r < rows; r++) {
    float* to = a.out + place(r);
    const float inverse = 1.0f / sum[r];
    for (long d = 0; d < Dh; d++) to[d] = o[r * Dp + d] * inverse;
  }
}

// Merges the partial results of a sequence's chunks, in order, into the output of its G heads.
static void merge(const Paged& a, long s, long kv, long chunks, const float* outs, const float* most,
                  const float* sum) {
  const long Dp = padded(a.Dh), G = a.H / a.K;
  for (long g = 0; g < G; g++) {
    float top = most[g], total = 0;
    for (long c = 1; c < chunks; c++) top = std::max(top, most[c * G + g]);
    std::vector<float> o(Dp, 0.0f);
    for (long c = 0; c < chunks; c++) {
      const float share = std::exp(most[c * G + g] - top);
      total += sum[c * G + g] * share;
      for (long d = 0; d < Dp; d += VL) store(&o[d], load(&o[d]) + load(outs + (c * G + g) * Dp + d) * share);
    }
    float* to = a.out + (a.first[s] * a.H + kv * G + g) * a.Dh;
    for (long d = 0; d < a.Dh; d++) to[d] = o[d] / total;
  }
}

struct Task {
  long s, kv, at, chunk;
};  // at: first key of a decode, or first row of a prefill; chunk: place of its first head's result, -1

template <class T>
static void attend(const Paged& a) {
  const long G = a.H / a.K, Dp = padded(a.Dh);
  const long span = std::max(1L, std::min<long>(1024 / (a.Dh * sizeof(T)), (a.K + 1) / 2));  // heads of a decode task
  static thread_local std::vector<Task> tasks;
  static thread_local std::vector<float> room;
  static thread_local std::vector<long> places;  // of the first result of a decode
  tasks.clear(), places.assign(a.S, 0);
  long results = 0;
  double work = 0;
  const auto chunks_of = [&](long s) { return (a.contexts[s] - a.seen_from(s, 0) + CHUNK - 1) / CHUNK; };
  for (long s = 0; s < a.S; s++)
    if (a.queries[s] > 1)
      for (long kv = 0; kv < a.K; kv++)
        for (long r = (a.queries[s] * G - 1) / ROWS * ROWS; r >= 0; r -= ROWS)
          tasks.push_back({s, kv, r, -1});  // longest first
  for (long s = 0; s < a.S; s++) {
    work += (double)a.queries[s] * (a.contexts[s] - a.seen_from(s, 0));
    if (a.queries[s] > 1) continue;
    const long chunks = chunks_of(s);
    for (long kv = 0; kv < a.K; kv += span)
      for (long c = 0; c < chunks; c++)
        tasks.push_back({s, kv, a.seen_from(s, 0) + c * CHUNK, results + kv * chunks + c});
    places[s] = results, results += a.K * chunks;
  }
  room.resize(results * G * (Dp + 2));
  float *outs = room.data(), *most = outs + results * G * Dp, *sum = most + results * G;
  const Task* list = tasks.data();
  const auto one = [&](long i) {
    const Task& t = list[i];
    if (t.chunk < 0) return prefill_tile<T>(a, t.s, t.kv, t.at);
    decode_chunk<T>(a, t.s, t.kv, std::min(t.kv + span, a.K), t.at, std::min(t.at + CHUNK, (long)a.contexts[t.s]),
                    outs + t.chunk * G * Dp, most + t.chunk * G, sum + t.chunk * G, chunks_of(t.s));
  };
  const long* first = places.data();
  const auto join = [&](long i) {
    const long s = i / a.K, kv = i % a.K, chunks = chunks_of(s), at = (first[s] + kv * chunks) * G;
    if (a.queries[s] == 1) merge(a, s, kv, chunks, outs + at * Dp, most + at, sum + at);
  };
  const long count = (long)tasks.size();
  if (work * a.H * a.Dh < SMALL)
    for (long i = 0; i < count; i++) one(i);
  else parallel(count, one);
  if (results <= 64 * a.K)
    for (long i = 0; i < a.S * a.K; i++) join(i);
  else parallel(a.S * a.K, join);
}
static void attend_float(const Paged& a) { attend<float>(a); }
static void attend_bfloat16(const Paged& a) { attend<uint16_t>(a); }
static void attend_int8(const Paged& a) { attend<int8_t>(a); }

static void round_to_bfloat16(const float* x, long n, uint16_t* out) {  // half to even; NaN stays NaN
  for (long i = 0; i < n; i++) {
    uint32_t bits;
    std::memcpy(&bits, x + i, 4);
    out[i] = (uint16_t)(x[i] != x[i] ? bits >> 16 | 64 : (bits + 0x7FFF + (bits >> 16 & 1)) >> 16);
  }
}

// One head of one token, rounded to int8 with the scale that is there already (fixed), or with its own: max |x| / 127.
static void round_head(const float* x, long Dh, int8_t* out, float* scale, bool fixed) {
  if (fixed) {
    for (long d = 0; d < Dh; d++) out[d] = (int8_t)std::min(127.0f, std::max(-127.0f, std::nearbyint(x[d] / *scale)));
    return;
  }
  vf m = {};
  for (long d = 0; d < Dh; d += VL) {
    const vf y = widen_at(x, d, Dh);
    m = vmax(m, vmax(y, -y));
  }
  const float most = hmax(m), inverse = most > 0 ? 127.0f / most : 0.0f;
  *scale = most / 127.0f;
  for (long d = 0; d < Dh; d++) out[d] = (int8_t)std::nearbyint(x[d] * inverse);
}
