// One row of logits to one id; see sample.cc. Included once per instruction set after simd.h.

typedef double vd __attribute__((vector_size(VL * 4)));
typedef long long vl __attribute__((vector_size(VL * 4)));
typedef float vf_half __attribute__((vector_size(VL * 2)));

// exp(x) for x <= 0, 0 below -708: 2^n p(r) with r = x - n ln 2; error about one unit in the last place.
static INLINE vd dexp(vd x) {
  const vd low = vd{} - 708.0;
  const vl keep = x > low;
  x = x > low ? x : low;
  const vd t = x * 1.4426950408889634 + 6755399441055744.0;  // 1.5 * 2^52: the integer part lands in the low bits
  const vd n = t - 6755399441055744.0;
  const vd r = x - n * 0.693147180369123816490 - n * 1.90821492927058770002e-10;
  vd p = vd{} + 1.0 / 6227020800.0;  // Taylor's series to r^13, |r| <= ln 2 / 2
  const double rest[] = {1.0 / 479001600.0,
                         1.0 / 39916800.0,
                         1.0 / 3628800.0,
                         1.0 / 362880.0,
                         1.0 / 40320.0,
                         1.0 / 5040.0,
                         1.0 / 720.0,
                         1.0 / 120.0,
                         1.0 / 24.0,
                         1.0 / 6.0,
                         0.5,
                         1.0,
                         1.0};
#pragma GCC unroll 13
  for (int i = 0; i < 13; i++) p = p * r + rest[i];
  const vl bits = ((vl)t - 0x4338000000000000LL + 1023) << 52;
  return (vd)((vl)(p * (vd)bits) & keep);
}

// Index of the first largest logit; -1 if any logit is NaN or the largest is infinite.
static long largest(const float* x, long V) {
  vf m = splat(-INFINITY);
  vi bad = {};
  long i = 0;
  for (; i + VL <= V; i += VL) {
    const vf y = load(x + i);
    m = vmax(m, y), bad |= y != y;
  }
  float most = hmax(m);
  int any = 0;
  for (int l = 0; l < VL; l++) any |= bad[l];
  for (; i < V; i++) most = std::max(most, x[i]), any |= x[i] != x[i];
  if (any || !std::isfinite(most)) return -1;
  return std::find(x, x + V, most) - x;
}

// exp((x - most) / temperature) in float64, and their sum.
static double exponentials(const float* x, long n, double most, double temperature, double* e) {
  constexpr long W = VL / 2;
  const double inverse = 1.0 / temperature;
  vd sum = {};
  const auto part = [&](const float* from, double* to) __attribute__((always_inline)) {
    vf_half y;
    std::memcpy(&y, from, sizeof(y));
    const vd z = dexp((__builtin_convertvector(y, vd) - most) * inverse);
    std::memcpy(to, &z, sizeof(z));
    sum += z;
  };
  long i = 0;
  for (; i + W <= n; i += W) part(x + i, e + i);
  if (i < n) {
    float rest[W];
    double values[W];
    for (long l = 0; l < W; l++) rest[l] = i + l < n ? x[i + l] : -INFINITY;  // exp gives 0
    part(rest, values);
    std::copy(values, values + (n - i), e + i);
  }
  double total = 0;
  for (long l = 0; l < W; l++) total += sum[l];
  return total;
}

static INLINE double total_of(vd x) {
  double total = 0;
  for (long l = 0; l < VL / 2; l++) total += x[l];
  return total;
}

// The sum and the number of the values above `least`, of those [i, n).
static Above above(const double* e, long i, long n, double least) {
  constexpr long W = VL / 2;
  vd sum[4] = {};
  vl count[4] = {};
  for (; i + 4 * W <= n; i += 4 * W)
#pragma GCC unroll 4
    for (long j = 0; j < 4; j++) {
      vd y;
      std::memcpy(&y, e + i + j * W, sizeof(y));
      const vl counts = y > least;  // -1 where true
      sum[j] += (vd)((vl)y & counts), count[j] += counts;
    }
  Above found{total_of((sum[0] + sum[1]) + (sum[2] + sum[3])), 0};
  const vl all = (count[0] + count[1]) + (count[2] + count[3]);
  for (long l = 0; l < W; l++) found.count -= all[l];
  for (; i < n; i++)
    if (e[i] > least) found.sum += e[i], found.count++;
  return found;
}

// Indices of the values above `least` and not above `most`, ascending.
static void between(const double* e, long n, double least, double most, std::vector<long>& ids) {
  constexpr long W = VL / 2;
  long i = 0;
  for (; i + 4 * W <= n; i += 4 * W) {
    vl any = {};
    for (long j = 0; j < 4; j++) {
      vd y;
      std::memcpy(&y, e + i + j * W, sizeof(y));
      any |= (y > least) & (y <= most);
    }
    long long found = 0;
    for (long l = 0; l < W; l++) found |= any[l];
    for (long j = i; found && j < i + 4 * W; j++)
      if (e[j] > least && e[j] <= most) ids.push_back(j);
  }
  for (; i < n; i++)
    if (e[i] > least && e[i] <= most) ids.push_back(i);
}

// A value that at least k of n values reach: the k-th largest of the maxima of runs; -infinity if there are fewer
// runs.
static float lower_bound_of_kth(const float* x, long n, long k) {
  constexpr long RUN = 4 * VL;
  if (n / RUN < 2 * k) return -INFINITY;
  std::vector<float> of(n / RUN);
  for (size_t r = 0; r < of.size(); r++) {
    const float* at = x + r * RUN;
    of[r] = hmax(vmax(vmax(load(at), load(at + VL)), vmax(load(at + 2 * VL), load(at + 3 * VL))));
  }
  std::nth_element(of.begin(), of.begin() + (k - 1), of.end(), std::greater<float>());
  return of[k - 1];
}

// Indices of the values that reach `least`, ascending.
static void at_least(const float* x, long n, float least, std::vector<long>& ids) {
  long i = 0;
  for (; i + 4 * VL <= n; i += 4 * VL) {
    const vi any = (load(x + i) >= least) | (load(x + i + VL) >= least) | (load(x + i + 2 * VL) >= least) |
                   (load(x + i + 3 * VL) >= least);
    int found = 0;
    for (long l = 0; l < VL; l++) found |= any[l];
    for (long j = i; found && j < i + 4 * VL; j++)
      if (x[j] >= least) ids.push_back(j);
  }
  for (; i < n; i++)
    if (x[i] >= least) ids.push_back(i);
}

// Of z = (x - most) / temperature: the sums of exp(z) and of z exp(z), in float64.
static Mass mass(const float* x, long n, float most, float temperature) {
  const float inverse = 1.0f / temperature;
  vd sum[2] = {}, dot[2] = {};
  const auto part = [&](vf y) __attribute__((always_inline)) {
    const vf z = vmax((y - most) * inverse, splat(-87.0f)), e = vexp(z), product = z * e;
    vf_half halves[2], products[2];
    std::memcpy(halves, &e, sizeof(e)), std::memcpy(products, &product, sizeof(product));
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      sum[j] += __builtin_convertvector(halves[j], vd);
      dot[j] += __builtin_convertvector(products[j], vd);
    }
  };
  long i = 0;
  for (; i + VL <= n; i += VL) part(load(x + i));
  if (i < n) {
    float rest[VL];
    for (long l = 0; l < VL; l++) rest[l] = i + l < n ? x[i + l] : -INFINITY;  // exp gives 0
    part(load(rest));
  }
  return {total_of(sum[0] + sum[1]), total_of(dot[0] + dot[1])};
}
