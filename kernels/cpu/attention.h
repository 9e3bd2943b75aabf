// Attention in tiles with an online softmax (Dao, arXiv 2307.08691) and FlashMask rows (arXiv 2410.01359); see
// attention.cc. Included once per instruction set and kind of product, inside a namespace, after attention_single.h or
// attention_half.h.

struct Head {  // inputs of backward for one query head
  const word *q, *d_out, *q_right, *d_out_right;
  const float *lse, *delta;
  float* d_q_rows;
  const int* rows;
  const Range* ranges;
  float slope;
};
struct Packed {
  const word *kt, *vt, *k;
};  // one key/value head: blocks packed by pack_transposed and pack_right

// What queries [i0, i1) see of keys [j0, j1): 0 nothing, 1 some, 2 all.
static int visibility(const Shape& s, const int* rows, const Range* ranges, long i0, long i1, long j0, long j1) {
  const long r0 = i0 + s.offset, r1 = i1 + s.offset;  // rows of the queries
  int seen = 2;
  if (s.causal) {
    if (j0 > r1 - 1) return 0;
    if (j1 - 1 > r0) seen = 1;
  }
  if (!rows) return seen;
  const Range* at = ranges + (j0 / BC) * s.n;
  // Hidden rows of key j are [start, stop). All rows are hidden if they are within the latest start and the earliest
  // stop.
  for (int part = 0; part < parts(s); part++) {
    const Interval of = interval(s, part);
    const long latest = of.start < 0 ? LONG_MIN : at[of.start].most,
               earliest = of.stop < 0 ? LONG_MAX : at[of.stop].least;
    if (latest <= r0 && r1 <= earliest) return 0;
    const long first = of.start < 0 ? LONG_MIN : at[of.start].least, last = of.stop < 0 ? LONG_MAX : at[of.stop].most;
    if (first < r1 && r0 < last) seen = 1;
  }
  return seen;
}

// Scores of a tile S (BR, BC): scaled, with softcap and ALiBi, -inf where masked. slope_block (or null): 1 - tanh^2 of
// the cap.
static void scores(const Shape& s, const word* q, const word* kt, const int* rows, float slope, int seen, long i0,
                   long i1, long j0, long j1, float* S, float* slope_block = nullptr) {
  multiply_transposed(i1 - i0, s.Dh, q + i0 * left_width(s.Dh), kt, S);
  const long width = j1 - j0;
  const float before_cap = s.softcap ? s.scale / s.softcap : 0.0f;
  for (long i = i0; i < i1; i++) {
    float* row = S + (i - i0) * BC;
    const long r = i + s.offset;
    if (!s.softcap) {
      for (long j = 0; j < BC; j += VL) store(row + j, load(row + j) * s.scale);
    } else {
      for (long j = 0; j < BC; j += VL) {
        const vf t = vtanh(load(row + j) * before_cap);
        store(row + j, t * s.softcap);
        if (slope_block) store(slope_block + (i - i0) * BC + j, 1.0f - t * t);
      }
    }
    if (slope != 0)
      for (long j = 0; j < width; j++) row[j] -= slope * (float)(r - j0 - j);
    for (long j = width; j < BC; j++) row[j] = -INFINITY;
    if (seen == 2) continue;
    if (s.causal)
      for (long j = std::max(0L, r + 1 - j0); j < width; j++) row[j] = -INFINITY;
    if (rows)
      for (int part = 0; part < parts(s); part++) {
        const Interval of = interval(s, part);
        for (long j = 0; j < width; j++) {
          const int* at = rows + (j0 + j) * s.n;
          const bool hidden = (of.start < 0 || r >= at[of.start]) && (of.stop < 0 || r < at[of.stop]);
          row[j] = hidden ? -INFINITY : row[j];
        }
      }
  }
}

// One tile of queries of one head: out (rows of out_stride), lse. Queries without visible keys: out 0 and lse +inf.
static void forward_tile(const Shape& s, const word* q, const word* kt, const word* v, const int* rows,
                         const Range* ranges, float slope, long i0, float* out, float* lse) {
  const long i1 = std::min(i0 + BR, s.Tq), Dp = padded(s.Dh);
  alignas(64) float S[BR * BC], most[BR], sum[BR];
  std::vector<float> O((size_t)BR * Dp, 0.0f);
  for (long i = 0; i < i1 - i0; i++) most[i] = -INFINITY, sum[i] = 0;
  for (long j0 = 0; j0 < s.Tk; j0 += BC) {
    const long j1 = std::min(j0 + BC, s.Tk);
    const int seen = visibility(s, rows, ranges, i0, i1, j0, j1);
    if (!seen) {
      if (s.causal && j0 > i1 - 1 + s.offset) break;
      continue;
    }
    scores(s, q, kt + j0 / BC * transposed_words(s.Dh), rows, slope, seen, i0, i1, j0, j1, S);
    for (long i = 0; i < i1 - i0; i++) {
      float* row = S + i * BC;
      vf m = load(row);
      for (long j = VL; j < BC; j += VL) m = vmax(m, load(row + j));
      const float now = std::max(most[i], hmax(m));
      if (now == -INFINITY) {
        std::memset(row, 0, BC * sizeof(float));
        continue;
      }
      vf total = vf{};
      for (long j = 0; j < BC; j += VL) {
        const vf p = vexp(load(row + j) - now);
        store(row + j, p);
        total += p;
      }
      if (now != most[i]) {
        const float shrink = std::exp(most[i] - now);
        sum[i] *= shrink;
        for (long d = 0; d < Dp; d += VL) store(&O[i * Dp + d], load(&O[i * Dp + d]) * shrink);
        most[i] = now;
      }
      sum[i] += hsum(total);
    }
    mix(i1 - i0, j1 - j0, s.Dh, S, v + j0 / BC * right_words(BC, s.Dh), O.data());
  }
  for (long i = 0; i < i1 - i0; i++) {
    const float inverse = sum[i] > 0 ? 1.0f / sum[i] : 0.0f;
    for (long d = 0; d < s.Dh; d++) out[(i0 + i) * s.q_stride + d] = O[i * Dp + d] * inverse;
    lse[i0 + i] = sum[i] > 0 ? most[i] + std::log(sum[i]) : INFINITY;
  }
}

// P and dS of a tile, recomputed. S (BR, BC): probabilities; dS (BR, BC): gradient of q k^T times scale; slope (BR,
// BC): room for the slope of a softcap, or null without.
static bool backward_scores(const Shape& s, const Head& h, const Packed& p, long i0, long i1, long j0, long j1,
                            float* S, float* dS, float* slope_block) {
  const int seen = visibility(s, h.rows, h.ranges, i0, i1, j0, j1);
  if (!seen) return false;
  const long block = j0 / BC * transposed_words(s.Dh);
  scores(s, h.q, p.kt + block, h.rows, h.slope, seen, i0, i1, j0, j1, S, slope_block);
  multiply_transposed(i1 - i0, s.Dh, h.d_out + i0 * left_width(s.Dh), p.vt + block, dS);
  for (long i = 0; i < i1 - i0; i++) {
    const float lse = h.lse[i0 + i], delta = h.delta[i0 + i];
    for (long j = 0; j < BC; j += VL) {
      const vf prob = lse == INFINITY ? vf{} : vexp(load(S + i * BC + j) - lse);
      store(S + i * BC + j, prob);
      store(dS + i * BC + j, prob * (load(dS + i * BC + j) - delta) * s.scale);
    }
    if (slope_block)
      for (long j = 0; j < BC; j += VL) store(dS + i * BC + j, load(dS + i * BC + j) * load(slope_block + i * BC + j));
  }
  return true;
}

// dK and dV of one block of keys, over all queries of the heads that share it; with_d_q: also their dQ.
static void backward_keys(const Shape& s, const std::vector<Head>& heads, const Packed& p, long j0, float* d_k,
                          float* d_v, bool with_d_q) {
  const long j1 = std::min(j0 + BC, s.Tk), Dp = padded(s.Dh);
  alignas(64) float S[BR * BC], dS[BR * BC];
  std::vector<float> K((size_t)BC * Dp, 0.0f), V((size_t)BC * Dp, 0.0f), slope_block(s.softcap ? BR * BC : 0);
  for (const Head& h : heads) {
    const long first = s.causal ? std::max(0L, j0 - s.offset) / BR * BR : 0;
    for (long i0 = first; i0 < s.Tq; i0 += BR) {
      const long i1 = std::min(i0 + BR, s.Tq);
      if (!backward_scores(s, h, p, i0, i1, j0, j1, S, dS, s.softcap ? slope_block.data() : nullptr)) continue;
      const long right = i0 / BR * right_words(BR, s.Dh);
      mix_transposed(i1 - i0, j1 - j0, s.Dh, S, h.d_out_right + right, V.data());
      mix_transposed(i1 - i0, j1 - j0, s.Dh, dS, h.q_right + right, K.data());
      if (with_d_q) mix(i1 - i0, j1 - j0, s.Dh, dS, p.k + j0 / BC * right_words(BC, s.Dh), h.d_q_rows + i0 * Dp);
    }
  }
  for (long j = j0; j < j1; j++)
    for (long d = 0; d < s.Dh; d++) {
      d_k[j * s.k_stride + d] = K[(j - j0) * Dp + d];
      d_v[j * s.k_stride + d] = V[(j - j0) * Dp + d];
    }
}

// Only dQ of one tile of queries, in the order of sums of backward_keys.
static void backward_queries(const Shape& s, const Head& h, const Packed& p, long i0) {
  const long i1 = std::min(i0 + BR, s.Tq), Dp = padded(s.Dh);
  alignas(64) float S[BR * BC], dS[BR * BC];
  std::vector<float> slope_block(s.softcap ? BR * BC : 0);
  for (long j0 = 0; j0 < s.Tk; j0 += BC) {
    const long j1 = std::min(j0 + BC, s.Tk);
    if (s.causal && j0 > i1 - 1 + s.offset) break;
    if (!backward_scores(s, h, p, i0, i1, j0, j1, S, dS, s.softcap ? slope_block.data() : nullptr)) continue;
    mix(i1 - i0, j1 - j0, s.Dh, dS, p.k + j0 / BC * right_words(BC, s.Dh), h.d_q_rows + i0 * Dp);
  }
}
// ------------------------------------------------------------- whole tensors: packing, and tasks for threads

static const int* rows_of(const Shape& s, const int* rows, long b, long h) {
  const long head = s.row_heads == 1 ? 0 : s.row_heads == s.K ? h / (s.H / s.K) : h;
  return rows ? rows + (b * s.row_heads + head) * s.Tk * s.n : nullptr;
}
static std::vector<Range> ranges_of(const Shape& s, const int* rows) {
  const long blocks = (s.Tk + BC - 1) / BC;
  std::vector<Range> found(rows ? s.B * s.row_heads * blocks * s.n : 0);
  for (long at = 0; at < (rows ? s.B * s.row_heads : 0); at++)
    for (long j = 0; j < s.Tk; j++)
      for (long c = 0; c < s.n; c++) {
        const int x = rows[(at * s.Tk + j) * s.n + c];
        Range& range = found[(at * blocks + j / BC) * s.n + c];
        range = j % BC ? Range{std::min(range.least, x), std::max(range.most, x)} : Range{x, x};
      }
  return found;
}
static const Range* ranges_at(const Shape& s, const std::vector<Range>& ranges, long b, long h) {
  const long head = s.row_heads == 1 ? 0 : s.row_heads == s.K ? h / (s.H / s.K) : h;
  return ranges.empty() ? nullptr : ranges.data() + (b * s.row_heads + head) * ((s.Tk + BC - 1) / BC) * s.n;
}

// x (T, Dh), row stride `stride`, packed in blocks of `block` rows as right operands; the last block has full size.
static void pack_rights(const float* x, long T, long stride, long Dh, long block, word* out) {
  for (long t = 0; t < T; t += block)
    pack_right(x + t * stride, std::min(block, T - t), stride, Dh, out + t / block * right_words(block, Dh));
}

static void forward(const Shape& s, const float* q, const float* k, const float* v, const int* rows,
                    const float* slopes, float* out, float* lse) {
  const long blocks = (s.Tk + BC - 1) / BC, tiles = (s.Tq + BR - 1) / BR, G = s.H / s.K;
  const size_t of_block = transposed_words(s.Dh), of_v = right_words(BC, s.Dh),
               of_q = (size_t)tiles * BR * left_width(s.Dh);
  const Room kt(s.B * s.K * blocks * of_block), vp(s.B * s.K * blocks * of_v), qp(s.B * s.H * of_q);
  const std::vector<Range> ranges = ranges_of(s, rows);
  parallel(s.B * s.K * blocks, [&](long at) {
    const long bk = at / blocks, j0 = at % blocks * BC, n = std::min(BC, s.Tk - j0);
    const long from = (bk / s.K * s.Tk + j0) * s.k_stride + bk % s.K * s.Dh;
    pack_transposed(k + from, n, s.k_stride, s.Dh, kt.at<word>(at * of_block));
    pack_right(v + from, n, s.k_stride, s.Dh, vp.at<word>(at * of_v));
  });
  parallel(s.B * s.H * tiles, [&](long at) {
    const long b = at / tiles / s.H, h = at / tiles % s.H, bk = b * s.K + h / G, i0 = (tiles - 1 - at % tiles) * BR;
    const long from = b * s.Tq * s.q_stride + h * s.Dh;
    word* left = qp.at<word>((b * s.H + h) * of_q);
    pack_left(q + from + i0 * s.q_stride, std::min(BR, s.Tq - i0), s.q_stride, s.Dh, left + i0 * left_width(s.Dh));
    forward_tile(s, left, kt.at<word>(bk * blocks * of_block), vp.at<word>(bk * blocks * of_v), rows_of(s, rows, b, h),
                 ranges_at(s, ranges, b, h), slopes ? slopes[h] : 0.0f, i0, out + from, lse + (b * s.H + h) * s.Tq);
  });
}

static void backward(const Shape& s, const float* q, const float* k, const float* v, const int* rows,
                     const float* slopes, const float* out, const float* lse, const float* d_out, float* d_q,
                     float* d_k, float* d_v) {
  const long Dp = padded(s.Dh), blocks = (s.Tk + BC - 1) / BC, tiles = (s.Tq + BR - 1) / BR, G = s.H / s.K,
             heads_q = s.B * s.H, heads_k = s.B * s.K;
  const size_t of_block = transposed_words(s.Dh), of_k = blocks * right_words(BC, s.Dh),
               of_q = (size_t)tiles * BR * left_width(s.Dh),
               of_right = LEFT_IS_RIGHT ? 0 : tiles * right_words(BR, s.Dh);
  const Room kt(heads_k * blocks * of_block), vt(heads_k * blocks * of_block), kp(heads_k * of_k), qp(heads_q * of_q),
      dop(heads_q * of_q), q_right(heads_q * of_right), do_right(heads_q * of_right);
  const Room d_q_rows(heads_q * s.Tq * Dp);
  std::vector<float> delta(heads_q * s.Tq);
  const std::vector<Range> ranges = ranges_of(s, rows);
  std::vector<Head> heads(heads_q);
  std::vector<Packed> packed(heads_k);
  for (long bk = 0; bk < heads_k; bk++)
    packed[bk] = {kt.at<word>(bk * blocks * of_block), vt.at<word>(bk * blocks * of_block), kp.at<word>(bk * of_k)};
  for (long bh = 0; bh < heads_q; bh++) {
    const Room &q_from = LEFT_IS_RIGHT ? qp : q_right, &do_from = LEFT_IS_RIGHT ? dop : do_right;
    const size_t of = LEFT_IS_RIGHT ? of_q : of_right;
    heads[bh] = {qp.at<word>(bh * of_q),
                 dop.at<word>(bh * of_q),
                 q_from.at<word>(bh * of),
                 do_from.at<word>(bh * of),
                 lse + bh * s.Tq,
                 delta.data() + bh * s.Tq,
                 d_q_rows.at<float>(bh * s.Tq * Dp),
                 rows_of(s, rows, bh / s.H, bh % s.H),
                 ranges_at(s, ranges, bh / s.H, bh % s.H),
                 slopes ? slopes[bh % s.H] : 0.0f};
  }
  const bool together =
      heads_k >= 4;  // one task per key/value head is enough; else dQ is computed separately, with the same sums
  parallel(heads_k * blocks, [&](long at) {
    const long bk = at / blocks, j0 = at % blocks * BC, n = std::min(BC, s.Tk - j0);
    const long from = (bk / s.K * s.Tk + j0) * s.k_stride + bk % s.K * s.Dh;
    pack_transposed(k + from, n, s.k_stride, s.Dh, kt.at<word>(at * of_block));
    pack_transposed(v + from, n, s.k_stride, s.Dh, vt.at<word>(at * of_block));
    pack_right(k + from, n, s.k_stride, s.Dh, kp.at<word>(bk * of_k + j0 / BC * right_words(BC, s.Dh)));
  });
  parallel(heads_q, [&](long bh) {
    const long from = bh / s.H * s.Tq * s.q_stride + bh % s.H * s.Dh;
    pack_left(q + from, s.Tq, s.q_stride, s.Dh, qp.at<word>(bh * of_q));
    pack_left(d_out + from, s.Tq, s.q_stride, s.Dh, dop.at<word>(bh * of_q));
    if (!LEFT_IS_RIGHT) {
      pack_rights(q + from, s.Tq, s.q_stride, s.Dh, BR, q_right.at<word>(bh * of_right));
      pack_rights(d_out + from, s.Tq, s.q_stride, s.Dh, BR, do_right.at<word>(bh * of_right));
    }
    std::memset(d_q_rows.at<float>(bh * s.Tq * Dp), 0, s.Tq * Dp * sizeof(float));
    for (long i = 0; i < s.Tq; i++) {
      const float *a = d_out + from + i * s.q_stride, *b = out + from + i * s.q_stride;
      vf sum = {};
      long d = 0;
      for (; d + VL <= s.Dh; d += VL) sum += as_operand(load(a + d)) * load(b + d);
      if (d < s.Dh) sum += as_operand(load_part(a + d, s.Dh - d)) * load_part(b + d, s.Dh - d);
      delta[bh * s.Tq + i] = hsum(sum);
    }
  });
  if (together) {
    parallel(heads_k, [&](long bk) {
      const std::vector<Head> group(heads.begin() + bk * G, heads.begin() + (bk + 1) * G);
      const long to = bk / s.K * s.Tk * s.k_stride + bk % s.K * s.Dh;
      for (long j = 0; j < blocks; j++) backward_keys(s, group, packed[bk], j * BC, d_k + to, d_v + to, true);
    });
  } else {
    parallel(heads_k * blocks, [&](long at) {
      const long bk = at / blocks, to = bk / s.K * s.Tk * s.k_stride + bk % s.K * s.Dh;
      const std::vector<Head> group(heads.begin() + bk * G, heads.begin() + (bk + 1) * G);
      backward_keys(s, group, packed[bk], at % blocks * BC, d_k + to, d_v + to, false);
    });
    parallel(heads_q * tiles, [&](long at) {
      const long bh = at / tiles;
      backward_queries(s, heads[bh], packed[bh / s.H * s.K + bh % s.H / G], (tiles - 1 - at % tiles) * BR);
    });
  }
  parallel(heads_q, [&](long bh) {
    const long to = bh / s.H * s.Tq * s.q_stride + bh % s.H * s.Dh;
    for (long i = 0; i < s.Tq; i++)
      std::memcpy(d_q + to + i * s.q_stride, d_q_rows.at<float>((bh * s.Tq + i) * Dp), s.Dh * sizeof(float));
  });
}
