// What the step of transformer.cc does to one token: norms, rotation. Included once per instruction set after simd.h.
#include "elementwise.h"

static void norm_token(const NormWeights& w, const float* x, long D, float* y) {
  float mean, r;
  if (w.center) norm_row<true>(x, nullptr, w.weight.data(), w.bias.data(), D, w.epsilon, nullptr, y, &mean, &r);
  else norm_row<false>(x, nullptr, w.weight.data(), nullptr, D, w.epsilon, nullptr, y, &mean, &r);
  if (!w.center && !w.bias.empty())
    for (long d = 0; d < D; d++) y[d] += w.bias[d];
}

// heads x Dh values; cos and sin (rotary / 2), or null: not rotated.
static void rotate_heads(const float* x, const float* cos, const float* sin, long heads, long Dh, long rotary,
                         bool neighbours, float* y) {
  if (!cos) std::copy(x, x + heads * Dh, y);
  else if (neighbours) rotate_token<true>(x, cos, sin, heads, Dh, rotary, 1.0f, y);
  else rotate_token<false>(x, cos, sin, heads, Dh, rotary, 1.0f, y);
}

static void add_row(const float* x, long n, float* y) {
  each(n, EACH(i, n, k) { put(y + i, get(y + i, n) + get(x + i, n), n); });
}
static void cap_row(float cap, long n, float* y) {
  each(n, EACH(i, n, k) { put(y + i, vtanh(get(y + i, n) * (1.0f / cap)) * cap, n); });
}
