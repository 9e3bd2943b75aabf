// Rows of logits for cross-entropy; see loss.cc. Included once per instruction set after simd.h.

static INLINE vf some(const float* p, long n, float rest) {  // the first n floats, `rest` after them
  if (n == VL) return load(p);
  vf x = splat(rest);
  std::memcpy(&x, p, n * sizeof(float));
  return x;
}
static INLINE vf exp_or_nan(vf x) { return x == x ? vexp(x) : x; }  // vexp(NaN) is 0

// x = cap tanh(x / cap)
static void apply_softcap(float* x, long n, float cap) {
  const float by = 1.0f / cap;
  long i = 0;
  for (; i + VL <= n; i += VL) store(x + i, vtanh(load(x + i) * by) * cap);
  if (i < n) {
    const vf t = vtanh(some(x + i, n - i, 0.0f) * by) * cap;
    std::memcpy(x + i, &t, (n - i) * sizeof(float));
  }
}
// g times the derivative of the softcap, given the capped value.
template <bool CAP>
static INLINE vf times_cap_slope(vf g, vf capped, float by) {
  return CAP ? g * (1.0f - (capped * by) * (capped * by)) : g;
}

// Updates a row with columns first … first + n - 1, capped if CAP. write: exp(logit - max), times the cap's slope,
// replaces them.
template <bool CAP>
static void update_row(float* x, long n, long first, long label, bool write, float cap, Row* row, int64_t* best) {
  if (CAP) apply_softcap(x, n, cap);
  const float by = 1.0f / cap;
  constexpr float LEAST = -INFINITY;
  vf tops[4] = {splat(LEAST), splat(LEAST), splat(LEAST), splat(LEAST)};
  long i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL)
    for (int k = 0; k < 4; k++) tops[k] = vmax(load(x + i + k * VL), tops[k]);
  for (; i < n; i += VL) tops[0] = vmax(some(x + i, std::min<long>(VL, n - i), LEAST), tops[0]);
  const float top = hmax(vmax(vmax(tops[0], tops[1]), vmax(tops[2], tops[3])));
  row->factor = 1.0f;
  if (top > row->max) {
    row->factor = std::exp(row->max - top);
    row->max = top;
    row->sum *= row->factor;
    long at = 0;
    while (x[at] != top) at++;
    *best = first + at;
  }
  if (label >= first && label < first + n) row->target = x[label - first];
  const float max = row->max == LEAST ? 0.0f : row->max;  // so that columns of only -inf add 0
  vf sums[2] = {};
  i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL)
    for (int k = 0; k < 2; k++) {
      const vf l = load(x + i + k * VL), e = exp_or_nan(l - max);
      sums[k] += e;
      if (write) store(x + i + k * VL, times_cap_slope<CAP>(e, l, by));
    }
  for (; i < n; i += VL) {
    const long left = std::min<long>(VL, n - i);
    const vf l = some(x + i, left, -INFINITY), e = exp_or_nan(l - max);
    sums[0] += e;
    const vf written = times_cap_slope<CAP>(e, l, by);
    if (write) std::memcpy(x + i, &written, left * sizeof(float));
  }
  row->sum += hsum(sums[0] + sums[1]);
}

// x = (exp(l - lse) - onehot(label)) * scale, times the cap's slope, with l = x, capped if CAP. A label outside of 0 …
// n - 1 is in another block.
template <bool CAP>
static void gradient(float* x, long n, float lse, long label, float scale, float cap) {
  if (CAP) apply_softcap(x, n, cap);
  const float by = 1.0f / cap;
  const bool has_label = label >= 0 && label < n;
  const float less = has_label ? times_cap_slope<CAP>(splat(scale), splat(x[label]), by)[0] : 0.0f;
  long i = 0;
  for (; i + VL <= n; i += VL) {
    const vf l = load(x + i);
    store(x + i, times_cap_slope<CAP>(exp_or_nan(l - lse) * scale, l, by));
  }
  if (i < n) {
    const vf l = some(x + i, n - i, 0.0f), p = times_cap_slope<CAP>(exp_or_nan(l - lse) * scale, l, by);
    std::memcpy(x + i, &p, (n - i) * sizeof(float));
  }
  if (has_label) x[label] -= less;
}

static void scaled_add(float* total, const float* more, float factor, long n) {
  long i = 0;
  for (; i + VL <= n; i += VL) store(total + i, load(total + i) * factor + load(more + i));
  for (; i < n; i++) total[i] = total[i] * factor + more[i];
}

static void copy(const void* from, bool is_short, long at, long n, float* to) {
  typedef unsigned vu __attribute__((vector_size(VL * 4)));
  typedef unsigned short vh __attribute__((vector_size(VL * 2)));
  if (!is_short) {
    std::memcpy(to, (const float*)from + at, n * sizeof(float));
    return;
  }
  const uint16_t* x = (const uint16_t*)from + at;  // bfloat16: the upper half of a float32
  for (long i = 0; i < n; i += VL) {
    const long left = std::min<long>(VL, n - i);
    vh part = {};
    std::memcpy(&part, x + i, left * sizeof(uint16_t));
    const vu whole = __builtin_convertvector(part, vu) << 16;
    std::memcpy(to + i, &whole, left * sizeof(float));
  }
}
