// Float32 multiply-adds in registers; see peak.cc. Included once per instruction set after simd.h.

constexpr int CHAINS = VL == 16 ? 24 : 12;  // independent sums: two per cycle with a latency of four, and a few more
constexpr long ROUND = 2L * VL * CHAINS;    // operations

static float multiply_add(long rounds) {
  vf c[CHAINS];  // different start values: the compiler merges equal chains
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) c[i] = splat((float)i);
  const vf a = splat(0.5f), b = splat(1.0f);
  for (long r = 0; r < rounds; r++)
#pragma GCC unroll 24
    for (int i = 0; i < CHAINS; i++) c[i] = c[i] * a + b;
  vf sum = {};
#pragma GCC unroll 24
  for (int i = 0; i < CHAINS; i++) sum += c[i];
  return hsum(sum);
}
static long work_of_a_round() { return ROUND; }

static float read_all(const float* x, long n) {
  vf sum[8] = {};
  for (long i = 0; i + 8 * VL <= n; i += 8 * VL)
#pragma GCC unroll 8
    for (int k = 0; k < 8; k++) sum[k] += load(x + i + k * VL);
  return hsum(sum[0] + sum[1] + sum[2] + sum[3] + sum[4] + sum[5] + sum[6] + sum[7]);
}
