// Norm, rotation and gate in one pass each; see elementwise.cc. Included once per instruction set after simd.h.

static INLINE void store_part(float* p, vf x, long n) { std::memcpy(p, &x, n * sizeof(float)); }

static void norm_row(const float* x, const float* w, long D, float epsilon, float* y, float* r) {
  vf sum = {};
  long d = 0;
  for (; d + VL <= D; d += VL) sum += load(x + d) * load(x + d);
  if (d < D) sum += load_part(x + d, D - d) * load_part(x + d, D - d);
  const float scale = 1.0f / std::sqrt(hsum(sum) / D + epsilon);
  for (long i = 0; i < D; i++) y[i] = x[i] * scale * w[i];
  *r = scale;
}

// dx = r (g - x r^2 mean(g x)) with g = dy w; dw += dy x r
static void norm_row_backward(const float* x, const float* w, float r, const float* dy, long D, float* dx, float* dw) {
  vf dot = {};
  long d = 0;
  for (; d + VL <= D; d += VL) dot += load(dy + d) * load(w + d) * load(x + d);
  if (d < D) dot += load_part(dy + d, D - d) * load_part(w + d, D - d) * load_part(x + d, D - d);
  const float mean = hsum(dot) / D * r * r;
  for (long i = 0; i < D; i++) dx[i] = r * (dy[i] * w[i] - x[i] * mean);
  for (long i = 0; i < D; i++) dw[i] += dy[i] * x[i] * r;
}

// heads x Dh values of one token; pairs are (i, i + Dh/2); sign -1 turns back
static void rotate_token(const float* __restrict x, const float* cos, const float* sin, long heads, long Dh, float sign, float* __restrict y) {
  const long half = Dh / 2;
  for (long h = 0; h < heads; h++, x += Dh, y += Dh)
    for (long i = 0; i < half; i++) {
      const float c = cos[i], s = sign * sin[i], a = x[i], b = x[i + half];
      y[i] = a * c - b * s;
      y[i + half] = b * c + a * s;
    }
}

static INLINE vf sigmoid(vf x) {
  const vf e = vexp(x < 0 ? x : -x);  // of a value that is not positive, so that nothing overflows
  return (x < 0 ? e : splat(1.0f)) / (1.0f + e);
}
static void gate(const float* g, const float* u, long n, float* y) {
  long i = 0;
  for (; i + VL <= n; i += VL) store(y + i, load(g + i) * sigmoid(load(g + i)) * load(u + i));
  if (i < n) store_part(y + i, load_part(g + i, n - i) * sigmoid(load_part(g + i, n - i)) * load_part(u + i, n - i), n - i);
}
static INLINE void gate_gradient(vf g, vf u, vf dy, vf* dg, vf* du) {
  const vf s = sigmoid(g);
  *dg = dy * u * s * (1.0f + g * (1.0f - s));
  *du = dy * g * s;
}
static void gate_backward(const float* g, const float* u, const float* dy, long n, float* dg, float* du) {
  vf a, b;
  long i = 0;
  for (; i + VL <= n; i += VL) gate_gradient(load(g + i), load(u + i), load(dy + i), &a, &b), store(dg + i, a), store(du + i, b);
  if (i < n) gate_gradient(load_part(g + i, n - i), load_part(u + i, n - i), load_part(dy + i, n - i), &a, &b), store_part(dg + i, a, n - i), store_part(du + i, b, n - i);
}
