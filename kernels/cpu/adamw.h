// AdamW and a sum of squares; see adamw.cc. Included once per instruction set after simd.h.

typedef unsigned vu __attribute__((vector_size(VL * 4)));
typedef unsigned short vh __attribute__((vector_size(VL * 2)));
typedef double vd __attribute__((vector_size(VL * 8)));

// n values of float32, or of bfloat16 as their upper 16 bits; zeros after them.
static INLINE vf read(const float* p, long n) {
  if (n == VL) return load(p);
  vf x = {};
  std::memcpy(&x, p, n * sizeof(float));
  return x;
}
static INLINE vf read(const uint16_t* p, long n) {
  vh x = {};
  std::memcpy(&x, p, n * sizeof(uint16_t));
  return (vf)(__builtin_convertvector(x, vu) << 16);
}
static INLINE void write(float* p, vf x, long n) { std::memcpy(p, &x, n * sizeof(float)); }
static INLINE void write(uint16_t* p, vf x, long n) {
  const vu bits = (vu)x, even = (bits + 0x7FFF + (bits >> 16 & 1)) >> 16;  // rounded to the nearest, ties to even
  const vh rounded = __builtin_convertvector(x == x ? even : bits >> 16 | 64, vh);  // what is not a number stays so
  std::memcpy(p, &rounded, n * sizeof(uint16_t));
}
static INLINE vf root(vf x) {
  vf y;
  for (int i = 0; i < VL; i++) y[i] = std::sqrt(x[i]);
  return y;
}

template <class P, class G>
static INLINE void update(P* p, const G* g, float* m1, float* m2, long n, const Constants& c) {
  const vf gradient = read(g, n) * c.grad_scale;
  const vf a = c.beta1 * read(m1, n) + c.rest1 * gradient, b = c.beta2 * read(m2, n) + c.rest2 * (gradient * gradient);
  write(m1, a, n), write(m2, b, n);
  write(p, read(p, n) * c.keep - c.rate * a / (root(b) * c.correction + c.epsilon), n);
}
template <class P, class G>
static void every(P* p, const G* g, float* m1, float* m2, long n, const Constants& c) {
  long i = 0;
  for (; i + VL <= n; i += VL) update(p + i, g + i, m1 + i, m2 + i, VL, c);
  if (i < n) update(p + i, g + i, m1 + i, m2 + i, n - i, c);
}
// From value `at` on; short_p, short_g: bfloat16.
static void adamw(void* p, bool short_p, const void* g, bool short_g, float* m1, float* m2, long at, long n,
                  const Constants& c) {
  m1 += at, m2 += at;
  if (short_p && short_g) every((uint16_t*)p + at, (const uint16_t*)g + at, m1, m2, n, c);
  else if (short_p) every((uint16_t*)p + at, (const float*)g + at, m1, m2, n, c);
  else if (short_g) every((float*)p + at, (const uint16_t*)g + at, m1, m2, n, c);
  else every((float*)p + at, (const float*)g + at, m1, m2, n, c);
}

template <class T>
static double sum_of_squares(const T* x, long n) {
  vd sums[2] = {};
  long i = 0;
  for (; i + 2 * VL <= n; i += 2 * VL)
    for (int k = 0; k < 2; k++) {
      const vd v = __builtin_convertvector(read(x + i + k * VL, VL), vd);
      sums[k] += v * v;
    }
  for (; i < n; i += VL) {
    const vd v = __builtin_convertvector(read(x + i, std::min<long>(VL, n - i)), vd);
    sums[0] += v * v;
  }
  sums[0] += sums[1];
  double sum = 0.0;
  for (int k = 0; k < VL; k++) sum += sums[0][k];
  return sum;
}
static double squares(const void* x, bool is_short, long at, long n) {
  return is_short ? sum_of_squares((const uint16_t*)x + at, n) : sum_of_squares((const float*)x + at, n);
}
