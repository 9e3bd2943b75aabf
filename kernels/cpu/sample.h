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

// Where `count` logits begin that are x + at (n - at) and -infinity after them: there, or in `rest`.
static INLINE const float* padded(const float* x, long n, long at, long count, float* rest) {
  if (n - at >= count) return x + at;
  std::fill(std::copy(x + at, x + n, rest), rest + count, -INFINITY);
  return rest;
}

// The largest of each run of x (V); false if a logit is NaN.
static bool maxima(const float* x, long V, std::vector<float>& runs) {
  vi bad = {};
  runs.clear();
  for (long i = 0; i < V; i += RUN) {
    float rest[RUN];
    const float* from = padded(x, V, i, RUN, rest);
    vf m = splat(-INFINITY);
    for (long j = 0; j < RUN; j += VL) {
      const vf y = load(from + j);
      m = vmax(m, y), bad |= y != y;
    }
    runs.push_back(hmax(m));
  }
  int any = 0;
  for (long l = 0; l < VL; l++) any |= bad[l];
  return !any;
}

static INLINE double total_of(vd x) {
  double total = 0;
  for (long l = 0; l < VL / 2; l++) total += x[l];
  return total;
}
static INLINE vd halves_added(vf x) {
  vf_half half[2];
  std::memcpy(half, &x, sizeof(x));
  return __builtin_convertvector(half[0], vd) + __builtin_convertvector(half[1], vd);
}

// e = exp((x - most) / temperature), also rounded to float32, both zero up to the end of the last block; the sums of
// blocks, and that of all.
static double exponentials(const float* x, long n, double most, double temperature, double* e, float* rounded,
                           double* sums) {
  const double inverse = 1.0 / temperature;
  double total = 0;
  for (long i = 0; i < n; i += BLOCK) {
    float rest[BLOCK];
    const float* from = padded(x, n, i, BLOCK, rest);
    vd sum = {};
    for (long j = 0; j < BLOCK; j += VL / 2) {
      vf_half y;
      std::memcpy(&y, from + j, sizeof(y));
      const vd z = dexp((__builtin_convertvector(y, vd) - most) * inverse);
      y = __builtin_convertvector(z, vf_half);
      std::memcpy(e + i + j, &z, sizeof(z)), std::memcpy(rounded + i + j, &y, sizeof(y));
      sum += z;
    }
    total += *sums++ = total_of(sum);
  }
  return total;
}

// The sum of the values above `least`, each block in float32.
static double above(const float* values, long blocks, float least) {
  vd total = {};
  for (long b = 0; b < blocks; b++) {
    vf sum[2] = {};
    for (long j = 0; j < BLOCK; j += 2 * VL)
      for (long k = 0; k < 2; k++) {
        const vf y = load(values + b * BLOCK + j + k * VL);
        sum[k] += (vf)((vi)y & (y > least));
      }
    total += halves_added(sum[0] + sum[1]);
  }
  return total_of(total);
}

// The sum of each block's values above `most`; the indices of those above `least` and not above `most`, ascending.
static void split(const double* e, long blocks, double least, double most, double* sums, std::vector<long>& between) {
  constexpr long W = VL / 2;
  for (long b = 0; b < blocks; b++) {
    vd sum = {};
    for (long i = b * BLOCK; i < (b + 1) * BLOCK; i += 4 * W) {
      vl any = {};
      for (long j = i; j < i + 4 * W; j += W) {
        vd y;
        std::memcpy(&y, e + j, sizeof(y));
        const vl is_more = y > most;
        sum += (vd)((vl)y & is_more), any |= (y > least) & ~is_more;
      }
      long long found = 0;
      for (long l = 0; l < W; l++) found |= any[l];
      for (long j = i; found && j < i + 4 * W; j++)
        if (e[j] > least && e[j] <= most) between.push_back(j);
    }
    sums[b] = total_of(sum);
  }
}

// Of z = (x - most) / temperature: the sums of exp(z) and of z exp(z), each block in float32.
static Mass mass(const float* x, long n, float most, float temperature) {
  const float inverse = 1.0f / temperature;
  vd sum = {}, dot = {};
  for (long i = 0; i < n; i += BLOCK) {
    float rest[BLOCK];
    const float* from = padded(x, n, i, BLOCK, rest);
    vf of_block = {}, dot_of_block = {};
    for (long j = 0; j < BLOCK; j += VL) {
      const vf z = vmax((load(from + j) - most) * inverse, splat(-87.0f)), e = vexp(z);
      of_block += e, dot_of_block += z * e;
    }
    sum += halves_added(of_block), dot += halves_added(dot_of_block);
  }
  return {total_of(sum), total_of(dot)};
}
