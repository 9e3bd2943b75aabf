// Products in bfloat16 of float32 or bfloat16 tensors, for kernels.linear, lora_linear and linear_cross_entropy with
// kernels.bf16.
//
// Operands are converted and packed inside; sums and results are float32. LoRA's product x A B is fused: R more
// columns of x and R more rows of W. Cross-entropy goes over the vocabulary in blocks, so that logits stay in the
// cache; what is stored of a block is at most its softmax in bfloat16, as the operand of the next products.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <vector>

#include "amx.h"
#include "op.h"
#include "threads.h"

using Tensor = paddle::Tensor;
using Shape = std::vector<int64_t>;
using Type = paddle::DataType;
using MaybeTensor = paddle::optional<Tensor>;

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace {
#define VL 16
#define NV 4
#define MR 6
#include "simd.h"
#undef MR
#include "gemm.h"

Matrix matrix(const Tensor& x, bool column_major = false) {  // (…, cols): leading dims become rows
  const long stride = x.shape().back(), rows = x.numel() / std::max(1L, stride);
  return {x.data(),     column_major ? stride : rows, column_major ? rows : stride, stride,
          column_major, x.dtype() == Type::BFLOAT16};
}
Matrix columns(const Matrix& x, long from, long to) {
  return {
      x.half ? (const void*)x.bits(0, from) : x.single(0, from), x.rows, to - from, x.stride, x.column_major, x.half};
}
auto panels_of(const Matrix& b) {
  return [b](long n, uint32_t* out) { pack_panel(b, n, out); };
}
// Panels of b followed by those of `more`, along the inner dimension.
auto panels_of(const Matrix& b, const Matrix& more) {
  return
      [b, more](long n, uint32_t* out) { pack_panel(b, n, out), pack_panel(more, n, out + inner_words(b.rows) * NR); };
}

// C = A B (+ bias) (+ residual)
void matmul(const Matrix& a, const Matrix& b, const float* bias, const float* residual, float* C) {
  const long count = inner_words(a.cols), N = b.cols, stride = row_stride(count);
  const Words packed = words(up(a.rows, 16) * stride);
  product(pack_all(a, packed.get(), stride), N, count, panels_of(b), C, N, false,
          [=](long m0, long m1, long n0, long n1) {
            if (bias || residual)
              for (long m = m0; m < m1; m++)
                for (long n = n0; n < n1; n++)
                  C[m * N + n] += (bias ? bias[n] : 0.0f) + (residual ? residual[m * N + n] : 0.0f);
          });
}

void scale_block(float* C, long ldc, float by, long m0, long m1, long n0, long n1) {
  for (long m = m0; m < m1; m++)
    for (long n = n0; n < n1; n++) C[m * ldc + n] *= by;
}

// t = scaling (dropped or x) A, y = [x t] [W; B] (+ bias)
void lora(const Matrix& x, const Matrix* dropped, const Matrix& w, const Matrix& a, const Matrix& b, const float* bias,
          float scaling, float* t, float* y) {
  const long M = x.rows, N = w.cols, R = a.cols, of_x = inner_words(x.cols), of_t = inner_words(R),
             stride = row_stride(of_x + of_t);
  const Words packed = words(up(M, 16) * stride);
  Words other;
  Rows rows = pack_all(x, packed.get(), stride), from = rows;
  if (dropped) other = words(up(M, 16) * row_stride(of_x)), from = pack_all(*dropped, other.get(), row_stride(of_x));
  product(from, R, of_x, panels_of(a), t, R, false,
          [=](long m0, long m1, long n0, long n1) { scale_block(t, R, scaling, m0, m1, n0, n1); });
  pack_all(Matrix{t, M, R, R, false, false}, packed.get() + of_x, stride);
  product(rows, N, of_x + of_t, panels_of(w, b), y, N, false, [=](long m0, long m1, long n0, long n1) {
    if (bias)
      for (long m = m0; m < m1; m++)
        for (long n = n0; n < n1; n++) y[m * N + n] += bias[n];
  });
}

// dt = scaling dy B^T; dx = [dy dt] [W^T; A^T] or, with dropout, dx = dy W^T and d_dropped = dt A^T; dA = (dropped or
// x)^T dt; dB = t^T dy
void lora_backward(const Matrix& dy, const Matrix& x, const Matrix& t, const Matrix& w, const Matrix& a,
                   const Matrix& b, float scaling, float* dx, float* d_dropped, float* da, float* db) {
  const long M = dy.rows, N = dy.cols, K = w.rows, R = a.cols, of_y = inner_words(N), of_t = inner_words(R),
             stride = row_stride(of_y + of_t);
  const Words packed = words(up(M, 16) * stride);
  const Rows rows = pack_all(dy, packed.get(), stride);
  std::vector<float> sums(M * R), da_t(R * K);
  float* dt = sums.data();
  product(rows, R, of_y, panels_of(b.transposed()), dt, R, false,
          [=](long m0, long m1, long n0, long n1) { scale_block(dt, R, scaling, m0, m1, n0, n1); });
  const Matrix dt_t{dt, R, M, R, true, false};
  const Rows rows_t = pack_all(dt_t.transposed(), packed.get() + of_y, stride);
  if (dx && d_dropped) {
    product(rows, K, of_y, panels_of(w.transposed()), dx, K, false, nothing);
    product(rows_t, K, of_t, panels_of(a.transposed()), d_dropped, K, false, nothing);
  } else if (dx) {
    product(rows, K, of_y + of_t, panels_of(w.transposed(), a.transposed()), dx, K, false, nothing);
  }
  const long of_m = inner_words(M);
  const Words few = words(up(R, 16) * row_stride(of_m));
  product(pack_all(dt_t, few.get(), row_stride(of_m)), K, of_m, panels_of(x), da_t.data(), K, false, nothing);
  for (long k = 0; k < K; k++)
    for (long r = 0; r < R; r++) da[k * R + r] = da_t[r * K + k];
  product(pack_all(t.transposed(), few.get(), row_stride(of_m)), N, of_m, panels_of(dy), db, N, false, nothing);
}

// ------------------------------------------------------------------------------------------- cross-entropy

constexpr long WIDTH = 1024;  // columns of the vocabulary per block; 96 rows of float32 logits are 384 KB
constexpr long HALF_ROW = WIDTH / 2 + 16;  // words of a row of the block in bfloat16; see row_stride()

// Logits of all rows for columns [n0, n0 + width), a block of rows at a time: calls use(m, logits), zero-padded to a
// multiple of 32. If softcap is not 0, logits are softcap * tanh(logit / softcap).
template <class Use>
void logits_of(const Rows& hidden, const Matrix& weight, long n0, long width, long count, float softcap,
               uint32_t* panels, Use use) {
  parallel((width + NR - 1) / NR,
           [&](long p) { pack_panel(columns(weight, n0, n0 + width), p * NR, panels + p * NR * count); });
  parallel((hidden.rows + MC - 1) / MC, [&](long block) {
    static thread_local std::vector<float> room;
    room.resize(MC * WIDTH);
    const long m0 = block * MC, m1 = std::min(hidden.rows, m0 + MC);
    for (long k = 0, depth = depth_of(count); k < count; k += depth)
      block_of(hidden, m0, m1, panels, count, k, std::min(count, k + depth), width, room.data(), WIDTH, k > 0);
    for (long m = m0; m < m1; m++) {
      float* logits = room.data() + (m - m0) * WIDTH;
      if (softcap)
        for (long n = 0; n < up(width, 32); n += VL)
          store(logits + n, vtanh(load(logits + n) * (1.0f / softcap)) * softcap);
      use(m, logits);
    }
  });
}

void store_half(uint16_t* out, vf x) { _mm256_storeu_si256((__m256i*)out, (__m256i)_mm512_cvtneps_pbh((__m512)x)); }
uint16_t half_of(float x) { return (uint16_t)_mm256_extract_epi16((__m256i)_mm512_cvtneps_pbh(_mm512_set1_ps(x)), 0); }
float single_of(uint16_t half) {
  const uint32_t bits = (uint32_t)half << 16;
  float x;
  std::memcpy(&x, &bits, 4);
  return x;
}
// g times the derivative of the softcap, given the capped logit; g if softcap is 0.
vf times_cap_slope(vf g, vf logit, float softcap) {
  if (!softcap) return g;
  const vf t = logit * (1.0f / softcap);
  return g * (1.0f - t * t);
}
float times_cap_slope(float g, float logit, float softcap) {
  return times_cap_slope(splat(g), splat(logit), softcap)[0];
}
vf part(const float* p, long n, float otherwise) {
  return (vf)_mm512_mask_loadu_ps(_mm512_set1_ps(otherwise), first(n), p);
}

// Per row: largest logit, its column, sum of exp(logit - most), the target's logit (0 if not among the columns).
struct RowStatistics {
  float *most, *sum, *target;
  int64_t* best;
};

// Updates the statistics of row m with its logits for columns [n0, n0 + width), and writes exp(logit - most), times
// the cap's slope, to `half` unless null. Returns the factor for earlier sums.
float update_row(const RowStatistics& seen, long m, const float* logits, long n0, long width, int64_t label,
                 float softcap, uint16_t* half) {
  vf top = splat(-std::numeric_limits<float>::infinity());
  for (long n = 0; n < width; n += VL) top = vmax(top, part(logits + n, width - n, logits[0]));
  const float before = seen.most[m], most = std::max(before, hmax(top));
  if (most > before) {
    long n = 0;
    while (logits[n] != most) n++;
    seen.best[m] = n0 + n;
  }
  if (label >= n0 && label < n0 + width) seen.target[m] = logits[label - n0];
  vf sum = {};
  for (long n = 0; n < up(width, 32); n += VL) {
    const vf e = vexp(part(logits + n, width - n, -std::numeric_limits<float>::infinity()) - most);
    sum += e;
    if (half) store_half(half + n, times_cap_slope(e, part(logits + n, width - n, 0.0f), softcap));
  }
  const float by = std::exp(before - most);
  seen.most[m] = most, seen.sum[m] = seen.sum[m] * by + hsum(sum);
  return by;
}

// Statistics for the losses and, unless acc is null, acc[m] = sum over columns of exp(logit - most) weight^T, times
// the cap's slope: the softmax part of the gradient of hidden, computed with the logits (online softmax).
void cross_entropy(const Matrix& hidden, const Matrix& weight, const int64_t* labels, float softcap,
                   const RowStatistics& seen, float* acc) {
  const long M = hidden.rows, D = hidden.cols, V = weight.cols, count = inner_words(D);
  const Words packed = words(up(M, 16) * row_stride(count)), panels = words(WIDTH * count),
              halves = words(acc ? M * HALF_ROW : 1);
  const Rows rows = pack_all(hidden, packed.get(), row_stride(count));
  std::fill(seen.most, seen.most + M, -std::numeric_limits<float>::infinity());
  std::fill(seen.sum, seen.sum + M, 0.0f), std::fill(seen.target, seen.target + M, 0.0f),
      std::fill(seen.best, seen.best + M, 0);
  for (long n0 = 0; n0 < V; n0 += WIDTH) {
    const long width = std::min(WIDTH, V - n0);
    logits_of(rows, weight, n0, width, count, softcap, panels.get(), [&](long m, const float* logits) {
      uint16_t* half = acc ? (uint16_t*)(halves.get() + m * HALF_ROW) : nullptr;
      const float by = update_row(seen, m, logits, n0, width, labels[m], softcap, half);
      if (acc && n0 && by != 1.0f) scale_block(acc + m * D, 0, by, 0, 1, 0, D);
    });
    if (acc)
      product(Rows{halves.get(), M, HALF_ROW}, D, inner_words(width),
              panels_of(columns(weight, n0, n0 + width).transposed()), acc, D, n0 > 0, nothing);
  }
}

// G = d_loss (softmax - onehot), times the cap's slope, in bfloat16, a block of columns at a time; d_hidden = G
// weight^T, d_weight = hidden^T G.
void cross_entropy_backward(const Matrix& hidden, const Matrix& weight, const int64_t* labels, const float* lse,
                            const float* d_loss, float softcap, float* d_hidden, float* d_weight) {
  const long M = hidden.rows, D = hidden.cols, V = weight.cols, count = inner_words(D), of_m = inner_words(M);
  const long of_row = row_stride(of_m);
  const Words packed = words(up(M, 16) * row_stride(count)), panels = words(WIDTH * count),
              halves = words(M * HALF_ROW);
  const Rows rows = pack_all(hidden, packed.get(), row_stride(count));
  // weight (V, D): its gradient is G^T hidden; weight (D, V): hidden^T G.
  const bool trained = d_weight != nullptr;
  const Words transposed_rows = words(!trained              ? 1
                                      : weight.column_major ? up(WIDTH, 16) * of_row
                                                            : up(D, 16) * of_row),
              hidden_panels = words(trained && weight.column_major ? up(D, NR) * of_m : 1);
  Rows hidden_t{};
  if (trained && weight.column_major)
    parallel((D + NR - 1) / NR, [&](long p) { pack_panel(hidden, p * NR, hidden_panels.get() + p * NR * of_m); });
  else if (trained) hidden_t = pack_all(hidden.transposed(), transposed_rows.get(), of_row);
  for (long n0 = 0; n0 < V; n0 += WIDTH) {
    const long width = std::min(WIDTH, V - n0);
    logits_of(rows, weight, n0, width, count, softcap, panels.get(), [&](long m, const float* logits) {
      uint16_t* half = (uint16_t*)(halves.get() + m * HALF_ROW);
      for (long n = 0; n < up(width, 32); n += VL)
        store_half(half + n,
                   times_cap_slope(
                       vexp(part(logits + n, width - n, -std::numeric_limits<float>::infinity()) - lse[m]) * d_loss[m],
                       part(logits + n, width - n, 0.0f), softcap));
      if (const long n = labels[m] - n0; n >= 0 && n < width)
        half[n] = half_of(times_cap_slope((std::exp(logits[n] - lse[m]) - 1.0f) * d_loss[m], logits[n], softcap));
    });
    product(Rows{halves.get(), M, HALF_ROW}, D, inner_words(width),
            panels_of(columns(weight, n0, n0 + width).transposed()), d_hidden, D, n0 > 0, nothing);
    const Matrix g{halves.get(), M, width, 2 * HALF_ROW, false, true};
    if (trained && weight.column_major)
      multiply(pack_all(g.transposed(), transposed_rows.get(), of_row), D, of_m, hidden_panels.get(), d_weight + n0 * D,
               D, false, nothing);
    else if (trained) product(hidden_t, width, of_m, panels_of(g), d_weight + n0, V, false, nothing);
  }
}

// d_loss[m] (acc[m] factor[m] - weight^T[label]). The second part, times the cap's slope, only for labels in these
// columns, with target[m] as their logit. Weight and slope are rounded as in acc: for a probability near 1 the
// difference is what matters.
void softmax_gradient(const Matrix& weight, const float* acc, const float* factor, const int64_t* labels,
                      const float* target, const float* d_loss, float softcap, long M, float* out) {
  const long D = weight.rows;
  parallel((M + MC - 1) / MC, [&](long block) {
    for (long m = block * MC; m < std::min(M, (block + 1) * MC); m++) {
      const float by = factor[m] * d_loss[m];
      for (long d = 0; d < D; d++) out[m * D + d] = acc[m * D + d] * by;
      const float pull = d_loss[m] * (softcap ? single_of(half_of(times_cap_slope(1.0f, target[m], softcap))) : 1.0f);
      if (labels[m] >= 0 && labels[m] < weight.cols)
        for (long d = 0; d < D; d++)
          out[m * D + d] -=
              pull * single_of(weight.half ? *weight.bits(d, labels[m]) : half_of(*weight.single(d, labels[m])));
    }
  });
}

}  // namespace
#pragma GCC pop_options

static Tensor fresh(const Shape& shape, const Tensor& like) {
  return paddle::empty(shape, Type::FLOAT32, like.place());
}
static const float* floats(const MaybeTensor& x) { return x ? x->data<float>() : nullptr; }

std::vector<Tensor> Bf16Matmul(const Tensor& a, const Tensor& b, const MaybeTensor& bias, const MaybeTensor& residual,
                               bool a_column_major, bool b_column_major) {
  const Matrix x = matrix(a, a_column_major), y = matrix(b, b_column_major);
  PD_CHECK(x.cols == y.rows, "inner dimensions differ");
  Tensor out = fresh({x.rows, y.cols}, a);
  matmul(x, y, floats(bias), floats(residual), out.data<float>());
  return {out};
}

std::vector<Tensor> Bf16Lora(const Tensor& x, const MaybeTensor& dropped, const Tensor& w, const Tensor& a,
                             const Tensor& b, const MaybeTensor& bias, float scaling, bool w_column_major) {
  const Matrix of_x = matrix(x), of_dropped = dropped ? matrix(*dropped) : of_x, of_w = matrix(w, w_column_major);
  Tensor y = fresh({of_x.rows, of_w.cols}, x), t = fresh({of_x.rows, a.shape()[1]}, x);
  lora(of_x, dropped ? &of_dropped : nullptr, of_w, matrix(a), matrix(b), floats(bias), scaling, t.data<float>(),
       y.data<float>());
  return {y, t};
}

std::vector<Tensor> Bf16LoraBackward(const Tensor& dy, const Tensor& x, const Tensor& t, const Tensor& w,
                                     const Tensor& a, const Tensor& b, float scaling, bool want_dx, bool was_dropped,
                                     bool w_column_major) {
  const Matrix of_x = matrix(x);
  Tensor dx = fresh({want_dx ? of_x.rows : 0, of_x.cols}, x),
         d_dropped = fresh({want_dx && was_dropped ? of_x.rows : 0, of_x.cols}, x), da = fresh(a.shape(), a),
         db = fresh(b.shape(), b);
  lora_backward(matrix(dy), of_x, matrix(t), matrix(w, w_column_major), matrix(a), matrix(b), scaling,
                want_dx ? dx.data<float>() : nullptr, want_dx && was_dropped ? d_dropped.data<float>() : nullptr,
                da.data<float>(), db.data<float>());
  return {dx, d_dropped, da, db};
}

std::vector<Tensor> Bf16CrossEntropy(const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                     bool column_major, float softcap, bool want_acc) {
  const Matrix h = matrix(hidden), w = matrix(weight, column_major);
  Tensor most = fresh({h.rows}, hidden), sum = fresh({h.rows}, hidden), target = fresh({h.rows}, hidden),
         best = paddle::empty({h.rows}, Type::INT64, hidden.place());
  Tensor acc = fresh({want_acc ? h.rows : 0, h.cols}, hidden);
  cross_entropy(h, w, labels.data<int64_t>(), softcap,
                RowStatistics{most.data<float>(), sum.data<float>(), target.data<float>(), best.data<int64_t>()},
                want_acc ? acc.data<float>() : nullptr);
  return {most, sum, target, best, acc};
}

std::vector<Tensor> Bf16CrossEntropyBackward(const Tensor& hidden, const Tensor& weight, const Tensor& labels,
                                             const Tensor& lse, const Tensor& d_loss, bool column_major, float softcap,
                                             bool frozen) {
  const Matrix h = matrix(hidden);
  Tensor d_hidden = fresh(hidden.shape(), hidden), d_weight = fresh(frozen ? Shape{0, 1} : weight.shape(), weight);
  cross_entropy_backward(h, matrix(weight, column_major), labels.data<int64_t>(), lse.data<float>(),
                         d_loss.data<float>(), softcap, d_hidden.data<float>(),
                         frozen ? nullptr : d_weight.data<float>());
  return {d_hidden, d_weight};
}

std::vector<Tensor> SoftmaxGradient(const Tensor& acc, const Tensor& factor, const Tensor& weight, const Tensor& labels,
                                    const Tensor& target, const Tensor& d_loss, bool column_major, float softcap) {
  Tensor out = fresh(acc.shape(), acc);
  softmax_gradient(matrix(weight, column_major), acc.data<float>(), factor.data<float>(), labels.data<int64_t>(),
                   target.data<float>(), d_loss.data<float>(), softcap, acc.shape()[0], out.data<float>());
  return {out};
}

PD_BUILD_OP(cpu_bf16_matmul)
    .Inputs({"a", "b", paddle::Optional("bias"), paddle::Optional("residual")})
    .Outputs({"c"})
    .Attrs({"a_column_major: bool", "b_column_major: bool"})
    .SetKernelFn(PD_KERNEL(Bf16Matmul));
PD_BUILD_OP(cpu_bf16_lora)
    .Inputs({"x", paddle::Optional("dropped"), "w", "a", "b", paddle::Optional("bias")})
    .Outputs({"y", "t"})
    .Attrs({"scaling: float", "w_column_major: bool"})
    .SetKernelFn(PD_KERNEL(Bf16Lora));
PD_BUILD_OP(cpu_bf16_lora_backward)
    .Inputs({"dy", "x", "t", "w", "a", "b"})
    .Outputs({"dx", "d_dropped", "da", "db"})
    .Attrs({"scaling: float", "want_dx: bool", "was_dropped: bool", "w_column_major: bool"})
    .SetKernelFn(PD_KERNEL(Bf16LoraBackward));
PD_BUILD_OP(cpu_bf16_cross_entropy)
    .Inputs({"hidden", "weight", "labels"})
    .Outputs({"most", "sum", "target", "best", "acc"})
    .Attrs({"column_major: bool", "softcap: float", "want_acc: bool"})
    .SetKernelFn(PD_KERNEL(Bf16CrossEntropy));
PD_BUILD_OP(cpu_bf16_cross_entropy_backward)
    .Inputs({"hidden", "weight", "labels", "lse", "d_loss"})
    .Outputs({"d_hidden", "d_weight"})
    .Attrs({"column_major: bool", "softcap: float", "frozen: bool"})
    .SetKernelFn(PD_KERNEL(Bf16CrossEntropyBackward));
PD_BUILD_OP(cpu_softmax_part)
    .Inputs({"acc", "factor", "weight", "labels", "target", "d_loss"})
    .Outputs({"d_hidden"})
    .Attrs({"column_major: bool", "softcap: float"})
    .SetKernelFn(PD_KERNEL(SoftmaxGradient));
