// Sums of float32 panels, and what becomes of sums; see panels.cc. Included once per instruction set after simd.h.
#include "elementwise.h"

// c (m1 - m0, 64) = x panel. Of several rows, 128 input rows of the panel (32 KB) stay in the first-level cache.
static void sums_float(const Panels& w, const Inputs& x, long m0, long m1, long panel, float* c, long ldc) {
  const float* b = (const float*)w.data.get() + panel * w.in * 64;
  const long depth = m1 - m0 > 1 ? 128 : w.in;
  for (long k = 0; k < w.in; k += depth)
    small_gemm(m1 - m0, 64, std::min(depth, w.in - k), x.x + m0 * x.stride + k, x.stride, 1, b + k * 64, 64, c, ldc,
               k > 0);
}

static INLINE vf activate(vf x, Activation kind) {
  vf slope;
  if (kind == ACT_SILU) return activation<SILU>(x, &slope);
  if (kind == ACT_GELU_TANH) return activation<GELU_TANH>(x, &slope);
  if (kind == ACT_GELU) return activation<GELU>(x, &slope);
  return x > 0 ? x : vf{};
}

// Sums c of rows [m0, m1) and panels [first, last) to where they belong.
template <SinkKind KIND>
static void finish_as(const Panels& w, const Sink& sink, long m0, long m1, long first, long last, const float* c,
                      long ldc) {
  const float *scales = w.scales.empty() || w.groups() > 1 ? nullptr : w.scales.data(),
              *bias = w.bias.empty() ? nullptr : w.bias.data();
  const long step = KIND == GATE ? 2 : 1;
  for (long m = m0; m < m1; m++) {
    const float *sums = c + (m - m0) * ldc - 64 * first, *extra = sink.extra + m * 64 * w.panels();
    const auto value = [&](long n) __attribute__((always_inline)) {  // n: column of W
      vf x = load(sums + n);
      if (scales) x *= load(scales + n);
      if (sink.extra) x += load(extra + n);
      return bias ? x + load(bias + n) : x;
    };
    for (long p = first; p < last; p += step) {
      const long from = 64 * (p / step);  // column of y
      float* y = sink.y + m * sink.width + from;
      const auto one = [&](long n, long left) __attribute__((always_inline)) {
        vf x = value(64 * p + n);
        if (KIND == GATE) x = activate(x, sink.activation) * value(64 * (p + 1) + n);
        if (KIND == ACTIVATE) x = activate(x, sink.activation);
        if (KIND == ADD) x = get(y + n, left) + x;
        __builtin_prefetch(y + n + sink.width, 1);  // the next row
        put(y + n, x, left);
      };
      if (from + 64 <= sink.width)
        for (long n = 0; n < 64; n += VL) one(n, VL);
      else
        for (long n = 0; from + n < sink.width; n += VL) one(n, std::min<long>(VL, sink.width - from - n));
    }
  }
}
static void finish(const Panels& w, const Sink& sink, long m0, long m1, long first, long last, const float* c,
                   long ldc) {
  const auto as = sink.kind == STORE ? finish_as<STORE> : sink.kind == ADD ? finish_as<ADD>
                                                       : sink.kind == GATE ? finish_as<GATE>
                                                                           : finish_as<ACTIVATE>;
  as(w, sink, m0, m1, first, last, c, ldc);
}
