// Norms, rope, gates and embedding on the CPU, one pass forward and one backward, float32; formulas as in
// kernels/__init__.py.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#include "op.h"
#include "threads.h"

#define BODY "elementwise.h"
#include "every_isa.h"

using Tensor = paddle::Tensor;
using Optional = paddle::optional<Tensor>;
using Shape = std::vector<int64_t>;
using Type = paddle::DataType;
constexpr long ROWS = 64, VALUES = 1 << 14;  // per task

static long rows_of(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.shape().back()); }
static long tasks(long n, long size) { return (n + size - 1) / size; }
static Tensor like(const Tensor& x) { return paddle::empty(x.shape(), x.dtype(), x.place()); }
static Tensor nothing(const Tensor& x) {
  return paddle::empty({0}, x.dtype(), x.place());
}  // for an output that is not needed

// Outputs y, h = x + residual, mean (CENTER), r.
template <bool CENTER>
static std::vector<Tensor> norm(const Tensor& x, const Optional& residual, const Tensor& w, const Optional& b,
                                float epsilon, int instructions) {
  const long D = x.shape().back(), rows = rows_of(x), which = level(instructions);
  Tensor y = like(x), h = residual ? like(x) : nothing(x), r = paddle::empty({rows}, x.dtype(), x.place()),
         mean = CENTER ? like(r) : nothing(x);
  const float *X = x.data<float>(), *W = w.data<float>(), *B = b ? b->data<float>() : nullptr,
              *A = residual ? residual->data<float>() : nullptr;
  float *Y = y.data<float>(), *R = r.data<float>(), *M = CENTER ? mean.data<float>() : R,
        *H = A ? h.data<float>() : nullptr;
  parallel(tasks(rows, ROWS), [&](long t) {
    for (long i = t * ROWS; i < std::min(rows, (t + 1) * ROWS); i++)
      PICK(which, norm_row<CENTER>)(X + i * D, A ? A + i * D : A, W, B, D, epsilon, A ? H + i * D : H, Y + i * D, M + i,
                                    R + i);
  });
  return {y, h, mean, r};
}
// dw and db: one partial sum per task, added in order. dx_copy: a second tensor for the residual, because Paddle adds
// to gradients in place and one tensor for two inputs would be wrong.
template <bool CENTER>
static std::vector<Tensor> norm_backward(const Tensor& x, const Tensor& w, const Tensor& mean, const Tensor& r,
                                         const Tensor& dy, const Optional& dh, bool dx_copy, int instructions) {
  const long D = x.shape().back(), rows = rows_of(x), which = level(instructions), wide = CENTER ? 2 * D : D;
  const long size = std::max(ROWS, tasks(rows, 64)), parts = tasks(rows, size);  // at most 64 tasks, for any length
  Tensor dx = like(x), copy = dx_copy ? like(x) : nothing(x), dw = like(w), db = CENTER ? like(w) : nothing(x);
  std::vector<float> sums(parts * wide, 0.0f);
  const float *X = x.data<float>(), *W = w.data<float>(), *M = mean.data<float>(), *R = r.data<float>(),
              *DY = dy.data<float>(), *DH = dh ? dh->data<float>() : nullptr;
  float *DX = dx.data<float>(), *COPY = dx_copy ? copy.data<float>() : nullptr, *DW = dw.data<float>(),
        *DB = CENTER ? db.data<float>() : nullptr;
  parallel(parts, [&](long t) {
    float* part = sums.data() + t * wide;
    for (long i = t * size; i < std::min(rows, (t + 1) * size); i++)
      PICK(which, norm_row_backward<CENTER>)(X + i * D, W, M[i], R[i], DY + i * D, DH ? DH + i * D : DH, D, DX + i * D,
                                             COPY ? COPY + i * D : COPY, part, part + D);
  });
  for (long p = 1; p < parts; p++)
    for (long d = 0; d < wide; d++) sums[d] += sums[p * wide + d];
  std::copy_n(sums.data(), parts ? D : 0, DW);
  if (CENTER) std::copy_n(sums.data() + D, parts ? D : 0, DB);
  return {dx, copy, dw, db};
}

std::vector<Tensor> RmsNorm(const Tensor& x, const Optional& residual, const Tensor& w, float epsilon,
                            int instructions) {
  return norm<false>(x, residual, w, paddle::none, epsilon, instructions);
}
std::vector<Tensor> RmsNormBackward(const Tensor& x, const Tensor& w, const Tensor& r, const Tensor& dy,
                                    const Optional& dh, bool dx_copy, int instructions) {
  return norm_backward<false>(x, w, r, r, dy, dh, dx_copy, instructions);
}
std::vector<Tensor> LayerNorm(const Tensor& x, const Optional& residual, const Tensor& w, const Optional& b,
                              float epsilon, int instructions) {
  return norm<true>(x, residual, w, b, epsilon, instructions);
}
std::vector<Tensor> LayerNormBackward(const Tensor& x, const Tensor& w, const Tensor& mean, const Tensor& r,
                                      const Tensor& dy, const Optional& dh, bool dx_copy, int instructions) {
  return norm_backward<true>(x, w, mean, r, dy, dh, dx_copy, instructions);
}

std::vector<Tensor> Rope(const Tensor& x, const Tensor& cos, const Tensor& sin, float sign, bool interleaved,
                         int instructions) {
  const auto shape = x.shape();
  const long tokens = shape[0] * shape[1], heads = shape[2], Dh = shape[3], rotary = cos.shape()[3],
             which = level(instructions);
  Tensor y = like(x);
  const float *X = x.data<float>(), *C = cos.data<float>(), *S = sin.data<float>();
  float* Y = y.data<float>();
  const auto rotate = interleaved ? PICK(which, rotate_token<true>) : PICK(which, rotate_token<false>);
  parallel(tasks(tokens, ROWS), [&](long t) {
    for (long i = t * ROWS; i < std::min(tokens, (t + 1) * ROWS); i++)
      rotate(X + i * heads * Dh, C + i * rotary, S + i * rotary, heads, Dh, rotary, sign, Y + i * heads * Dh);
  });
  return {y};
}

// kind: 0 silu, 1 gelu by tanh, 2 gelu.
#define BY_KIND(function) \
  (kind == 0 ? PICK(which, function<0>) : kind == 1 ? PICK(which, function<1>) : PICK(which, function<2>))

// y = a(gate) up, or a(gate) if up is null.
std::vector<Tensor> Gate(const Tensor& gate, const Optional& up, int kind, int instructions) {
  Tensor y = like(gate);
  const long n = gate.numel(), which = level(instructions);
  const float *G = gate.data<float>(), *U = up ? up->data<float>() : nullptr;
  float* Y = y.data<float>();
  parallel(tasks(n, VALUES), [&](long t) {
    const long at = t * VALUES;
    BY_KIND(gate)(G + at, U ? U + at : U, std::min(VALUES, n - at), Y + at);
  });
  return {y};
}
std::vector<Tensor> GateBackward(const Tensor& gate, const Optional& up, const Tensor& dy, int kind, int instructions) {
  Tensor dg = like(gate), du = up ? like(gate) : nothing(gate);
  const long n = gate.numel(), which = level(instructions);
  const float *G = gate.data<float>(), *U = up ? up->data<float>() : nullptr, *DY = dy.data<float>();
  float *DG = dg.data<float>(), *DU = du.data<float>();
  parallel(tasks(n, VALUES), [&](long t) {
    const long at = t * VALUES;
    BY_KIND(gate_backward)(G + at, U ? U + at : U, DY + at, std::min(VALUES, n - at), DG + at, U ? DU + at : DU);
  });
  return {dg, du};
}

// Rows of w (V, D) by ids, and their gradient: rows of dy summed in the order of ids, COLUMNS columns per task.
std::vector<Tensor> Embedding(const Tensor& ids, const Tensor& w) {
  const long V = w.shape()[0], D = w.shape()[1], n = ids.numel();
  auto shape = ids.shape();
  shape.push_back(D);
  Tensor y = paddle::empty(shape, w.dtype(), w.place());
  const int64_t* I = ids.data<int64_t>();
  const float* W = w.data<float>();
  float* Y = y.data<float>();
  for (long i = 0; i < n; i++) PD_CHECK(I[i] >= 0 && I[i] < V, "id ", I[i], " is not in a table of ", V, " rows");
  parallel(tasks(n, ROWS), [&](long t) {
    for (long i = t * ROWS; i < std::min(n, (t + 1) * ROWS); i++) std::copy_n(W + I[i] * D, D, Y + i * D);
  });
  return {y};
}
std::vector<Tensor> EmbeddingBackward(const Tensor& ids, const Tensor& w, const Tensor& dy) {
  const long D = w.shape()[1], n = ids.numel(), COLUMNS = 128;
  // Fresh pages of the system are zeros and take memory only when written: a large table stays sparse.
  void* memory = std::calloc(w.numel() + 16, sizeof(float));
  PD_CHECK(memory, "no memory for the gradient of an embedding");
  float* DW = (float*)(((uintptr_t)memory + 63) / 64 * 64);
  Tensor dw = paddle::from_blob(DW, w.shape(), w.dtype(), phi::DataLayout::NCHW, w.place(),
                                [memory](void*) { std::free(memory); });
  const int64_t* I = ids.data<int64_t>();
  const float* DY = dy.data<float>();
  parallel(tasks(D, COLUMNS), [&](long t) {
    const long from = t * COLUMNS, to = std::min(D, from + COLUMNS);
    for (long i = 0; i < n; i++)
      for (long d = from; d < to; d++) DW[I[i] * D + d] += DY[i * D + d];
  });
  return {dw};
}

static std::vector<Shape> RopeShape(const Shape& x, const Shape& cos, const Shape& sin) { return {x}; }
static std::vector<Type> RopeType(Type x, Type cos, Type sin) { return {x}; }

// No shape and dtype inference: these run only on a dynamic graph.
PD_BUILD_OP(cpu_rms_norm)
    .Inputs({"x", paddle::Optional("residual"), "w"})
    .Outputs({"y", "h", "mean", "r"})
    .Attrs({"epsilon: float", "instructions: int"})
    .SetKernelFn(PD_KERNEL(RmsNorm));
PD_BUILD_OP(cpu_rms_norm_backward)
    .Inputs({"x", "w", "r", "dy", paddle::Optional("dh")})
    .Outputs({"dx", "dx_copy", "dw", "db"})
    .Attrs({"twice: bool", "instructions: int"})
    .SetKernelFn(PD_KERNEL(RmsNormBackward));
PD_BUILD_OP(cpu_layer_norm)
    .Inputs({"x", paddle::Optional("residual"), "w", paddle::Optional("b")})
    .Outputs({"y", "h", "mean", "r"})
    .Attrs({"epsilon: float", "instructions: int"})
    .SetKernelFn(PD_KERNEL(LayerNorm));
PD_BUILD_OP(cpu_layer_norm_backward)
    .Inputs({"x", "w", "mean", "r", "dy", paddle::Optional("dh")})
    .Outputs({"dx", "dx_copy", "dw", "db"})
    .Attrs({"twice: bool", "instructions: int"})
    .SetKernelFn(PD_KERNEL(LayerNormBackward));
PD_BUILD_OP(cpu_gate)
    .Inputs({"gate", paddle::Optional("up")})
    .Outputs({"y"})
    .Attrs({"kind: int", "instructions: int"})
    .SetKernelFn(PD_KERNEL(Gate));
PD_BUILD_OP(cpu_gate_backward)
    .Inputs({"gate", paddle::Optional("up"), "dy"})
    .Outputs({"dg", "du"})
    .Attrs({"kind: int", "instructions: int"})
    .SetKernelFn(PD_KERNEL(GateBackward));
PD_BUILD_OP(cpu_embedding).Inputs({"ids", "w"}).Outputs({"y"}).SetKernelFn(PD_KERNEL(Embedding));
PD_BUILD_OP(cpu_embedding_backward)
    .Inputs({"ids", "w", "dy"})
    .Outputs({"dw"})
    .SetKernelFn(PD_KERNEL(EmbeddingBackward));
PD_BUILD_OP(cpu_rope)
    .Inputs({"x", "cos", "sin"})
    .Outputs({"y"})
    .Attrs({"sign: float", "interleaved: bool", "instructions: int"})
    .SetKernelFn(PD_KERNEL(Rope))
    .SetInferShapeFn(PD_INFER_SHAPE(RopeShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(RopeType));
