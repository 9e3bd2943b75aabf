// Rows of logits for cross-entropy; see loss.cc. Included once per instruction set after simd.h.

static INLINE vf some(const float* p, long n, float rest) {  // the first n floats, `rest` after them
  if (n == VL) return load(p);
  vf x = splat(rest);
  std::memcpy(&x, p, n * sizeof(float));
  return x;
}
static INLINE vf exp_or_nan(vf x) { return x == x ? vexp(x) : x; }  // vexp makes 0 of what is not a number

// x = cap tanh(x / cap)
static void soften(float* x, long n, float cap) {
  const float by = 1.0f / cap;
  long i = 0;
  for (; i + VL <= n; i += VL) store(x + i, vtanh(load(x + i) * by) * cap);
  if (i < n) {
    const vf t = vtanh(some(x + i, n - i, 0.0f) * by) * cap;
    std::memcpy(x + i, &t, (n - i) * sizeof(float));
  }
}
// g times the slope of soften, by what it made of x.
template <bool CAP>
static INLINE vf bent(vf g, vf softened, float by) {
  return CAP ? g * (1.0f - (softened * by) * (softened * by)) : g;
}

// Columns first … first + n - 1, softened where CAP. With `write`, exp(logit - max), bent, in place of them.
template <bool CAP>
static void see(float* x, long n, long first, long label, bool write, float cap, Row* row, int64_t* best) {
  if (CAP) soften(x, n, cap);
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
  const float max = row->max == LEAST ? 0.0f : row->max;  // so that columns of -inf alone add nothing
  vf sums[2] = {};
  i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL)
    for (int k = 0; k < 2; k++) {
      const vf l = load(x + i + k * VL), e = exp_or_nan(l - max);
      sums[k] += e;
      if (write) store(x + i + k * VL, bent<CAP>(e, l, by));
    }
  for (; i < n; i += VL) {
    const long left = std::min<long>(VL, n - i);
    const vf l = some(x + i, left, -INFINITY), e = exp_or_nan(l - max);
    sums[0] += e;
    const vf written = bent<CAP>(e, l, by);
    if (write) std::memcpy(x + i, &written, left * sizeof(float));
  }
  row->sum += hsum(sums[0] + sums[1]);
}

// x = (exp(l - lse) - onehot(label)) * scale, bent, l being x, softened where CAP; a label outside of 0 … n - 1 is
// another block's.
template <bool CAP>
static void gradient(float* x, long n, float lse, long label, float scale, float cap) {
  if (CAP) soften(x, n, cap);
  const float by = 1.0f / cap;
  const bool mine = label >= 0 && label < n;
  const float less = mine ? bent<CAP>(splat(scale), splat(x[label]), by)[0] : 0.0f;
  long i = 0;
  for (; i + VL <= n; i += VL) {
    const vf l = load(x + i);
    store(x + i, bent<CAP>(exp_or_nan(l - lse) * scale, l, by));
  }
  if (i < n) {
    const vf l = some(x + i, n - i, 0.0f), p = bent<CAP>(exp_or_nan(l - lse) * scale, l, by);
    std::memcpy(x + i, &p, (n - i) * sizeof(float));
  }
  if (mine) x[label] -= less;
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
