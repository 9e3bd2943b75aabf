// Norm, rotation and gate, one pass each; see elementwise.cc. Included once per instruction set after simd.h.

static INLINE void store_part(float* p, vf x, long n) { std::memcpy(p, &x, n * sizeof(float)); }

static INLINE vf get(const float* p, long n) { return n == VL ? load(p) : load_part(p, n); }
static INLINE void put(float* p, vf x, long n) { n == VL ? store(p, x) : store_part(p, x, n); }

// Calls f(at, count, k) for each vector of n values; the last may be short. k alternates 0, 1: two partial sums, so
// that additions do not wait for each other.
template <class F>
static INLINE void each(long n, F f) {
  long i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL) f(i, long(VL), 0), f(i + VL, long(VL), 1);
  for (; i < n; i += VL) f(i, std::min<long>(VL, n - i), 0);
}
#define EACH(at, n, k) [&](long at, long n, int k) __attribute__((always_inline))

// y = (h - mean) r w + b with h = x + residual. CENTER: LayerNorm; else RMSNorm: mean is 0 and there is no b. stats:
// mean (only CENTER), r. Zeros past the end would count in a sum around the mean, so they are left out.
template <bool CENTER>
static void norm_row(const float* x, const float* residual, const float* w, const float* b, long D, float epsilon,
                     float* h, float* y, float* mean, float* r) {
  vf sum[2] = {}, squares[2] = {};
  each(
      D, EACH(d, n, k) {
        vf v = get(x + d, n);
        if (residual) v += get(residual + d, n), put(h + d, v, n);
        if (CENTER) sum[k] += v;
        else squares[k] += v * v;
      });
  if (residual) x = h;
  const float m = CENTER ? hsum(sum[0] + sum[1]) / D : 0.0f;
  float total = 0.0f;
  if (CENTER) {
    long d = 0;
    for (; d + VL <= D; d += VL) squares[0] += (load(x + d) - m) * (load(x + d) - m);
    for (; d < D; d++) total += (x[d] - m) * (x[d] - m);
  }
  const float scale = 1.0f / std::sqrt((total + hsum(squares[0] + squares[1])) / D + epsilon);
  each(
      D, EACH(d, n, k) {
        vf v = (CENTER ? get(x + d, n) - m : get(x + d, n)) * scale * get(w + d, n);
        if (CENTER && b) v += get(b + d, n);
        put(y + d, v, n);
      });
  if (CENTER) *mean = m;
  *r = scale;
}

// With z = (x - mean) r and g = dy w: dx = r (g - mean(g) - z mean(g z)) + dh, written twice if requested; dw += dy z,
// db += dy.
template <bool CENTER>
static void norm_row_backward(const float* x, const float* w, float m, float r, const float* dy, const float* dh,
                              long D, float* dx, float* dx_copy, float* dw, float* db) {
  vf sum[2] = {}, dot[2] = {};
  each(
      D, EACH(d, n, k) {
        const vf u = get(dy + d, n), z = (CENTER ? get(x + d, n) - m : get(x + d, n)) * r, g = u * get(w + d, n);
        dot[k] += g * z;  // past the end g is zero
        if (CENTER) sum[k] += g;
        put(dw + d, get(dw + d, n) + u * z, n);
        if (CENTER && db) put(db + d, get(db + d, n) + u, n);
      });
  const float mean_g = CENTER ? hsum(sum[0] + sum[1]) / D : 0.0f, mean_gz = hsum(dot[0] + dot[1]) / D;
  each(
      D, EACH(d, n, k) {
        const vf z = (CENTER ? get(x + d, n) - m : get(x + d, n)) * r;
        vf v = get(dy + d, n) * get(w + d, n) - z * mean_gz;
        if (CENTER) v -= mean_g;
        v *= r;
        if (dh) v += get(dh + d, n);
        put(dx + d, v, n);
        if (dx_copy) put(dx_copy + d, v, n);
      });
}

// heads x Dh values of one token; pairs of the first `rotary` dims are (i, i + rotary/2) or (2 i, 2 i + 1); sign -1
// rotates back.
template <bool NEIGHBOURS>
static void rotate_token(const float* __restrict x, const float* cos, const float* sin, long heads, long Dh,
                         long rotary, float sign, float* __restrict y) {
  const long half = rotary / 2;
  for (long h = 0; h < heads; h++, x += Dh, y += Dh) {
    for (long i = 0; i < half; i++) {
      const long p = NEIGHBOURS ? 2 * i : i, q = NEIGHBOURS ? 2 * i + 1 : i + half;
      const float c = cos[i], s = sign * sin[i], a = x[p], b = x[q];
      y[p] = a * c - b * s;
      y[q] = b * c + a * s;
    }
    std::copy(x + rotary, x + Dh, y + rotary);
  }
}

static INLINE vf sigmoid(vf x) {
  const vf e = vexp(x < 0 ? x : -x);  // the argument is <= 0, so that nothing overflows
  return (x < 0 ? e : splat(1.0f)) / (1.0f + e);
}

// Phi(-u) e^(u^2/2) for u >= 0, the tail of the normal distribution without its Gaussian: a polynomial in 1 / (1 +
// 0.35 u), fitted for the smallest relative error, 3e-8 before rounding.
static INLINE vf tail(vf u) {
  const vf t = 1.0f / (1.0f + 0.35f * u);
  vf p = splat(-0.0291461386f);
  p = p * t + 0.14397271f;
  p = p * t - 0.255716324f;
  p = p * t + 0.159176499f;
  p = p * t - 0.0231114179f;
  p = p * t + 0.105508663f;
  p = p * t + 0.119832702f;
  p = p * t + 0.139861897f;
  p = p * t + 0.139621407f;
  return p * t;
}

enum { SILU, GELU_TANH, GELU };

// a(g) and its derivative.
template <int KIND>
static INLINE vf activation(vf g, vf* slope) {
  if (KIND == SILU) {
    const vf s = sigmoid(g);
    *slope = s * (1.0f + g * (1.0f - s));
    return g * s;
  }
  if (KIND == GELU_TANH) {  // (1 + tanh(z)) / 2 = sigmoid(2 z)
    const vf s = sigmoid(1.59576912f * g * (1.0f + 0.044715f * g * g));
    *slope = s + g * s * (1.0f - s) * 1.59576912f * (1.0f + 0.134145f * g * g);
    return g * s;
  }
  const vf u = g < 0 ? -g : g, bell = vexp(-0.5f * u * u), under = bell * tail(u), phi = g < 0 ? under : 1.0f - under;
  *slope = phi + g * bell * 0.398942280f;
  return g * phi;
}

template <int KIND>  // u null means 1
static void gate(const float* g, const float* u, long n, float* y) {
  each(
      n, EACH(i, n, k) {
        vf slope;
        const vf a = activation<KIND>(get(g + i, n), &slope);
        put(y + i, u ? a * get(u + i, n) : a, n);
      });
}
template <int KIND>
static void gate_backward(const float* g, const float* u, const float* dy, long n, float* dg, float* du) {
  each(
      n, EACH(i, n, k) {
        vf slope;
        const vf d = get(dy + i, n), a = activation<KIND>(get(g + i, n), &slope);
        put(dg + i, u ? d * get(u + i, n) * slope : d * slope, n);
        if (u) put(du + i, d * a, n);
      });
}
