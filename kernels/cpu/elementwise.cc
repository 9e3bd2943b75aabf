// rms_norm, rope and swiglu on the CPU, one pass forward and one backward, float32; formulas as in kernels/__init__.py.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "op.h"
#include "threads.h"

#define BODY "elementwise.h"
#include "every_isa.h"

using Tensor = paddle::Tensor;
using Shape = std::vector<int64_t>;
using Type = paddle::DataType;
constexpr long ROWS = 64, VALUES = 1 << 14;  // of one task

static long rows_of(const Tensor& x) { return x.numel() / std::max<int64_t>(1, x.shape().back()); }
static long tasks(long n, long size) { return (n + size - 1) / size; }
static Tensor like(const Tensor& x) { return paddle::empty(x.shape(), x.dtype(), x.place()); }

std::vector<Tensor> RmsNorm(const Tensor& x, const Tensor& w, float epsilon) {
  const long D = x.shape().back(), rows = rows_of(x);
  Tensor y = like(x), r = paddle::empty({rows}, x.dtype(), x.place());
  const float *X = x.data<float>(), *W = w.data<float>();
  float *Y = y.data<float>(), *R = r.data<float>();
  parallel(tasks(rows, ROWS), [&](long t) {
    for (long i = t * ROWS; i < std::min(rows, (t + 1) * ROWS); i++) PICK(level(), norm_row)(X + i * D, W, D, epsilon, Y + i * D, R + i);
  });
  return {y, r};
}
std::vector<Tensor> RmsNormBackward(const Tensor& x, const Tensor& w, const Tensor& r, const Tensor& dy) {
  const long D = x.shape().back(), rows = rows_of(x), parts = tasks(rows, ROWS);
  Tensor dx = like(x), dw = paddle::full({D}, 0.0, x.dtype(), x.place());
  std::vector<float> sums(parts * D, 0.0f);  // a part of dw for each task, added up in order
  const float *X = x.data<float>(), *W = w.data<float>(), *R = r.data<float>(), *DY = dy.data<float>();
  float* DX = dx.data<float>();
  parallel(parts, [&](long t) {
    for (long i = t * ROWS; i < std::min(rows, (t + 1) * ROWS); i++) PICK(level(), norm_row_backward)(X + i * D, W, R[i], DY + i * D, D, DX + i * D, sums.data() + t * D);
  });
  float* DW = dw.data<float>();
  for (long t = 0; t < parts; t++)
    for (long d = 0; d < D; d++) DW[d] += sums[t * D + d];
  return {dx, dw};
}

std::vector<Tensor> Rope(const Tensor& x, const Tensor& cos, const Tensor& sin, float sign) {
  const auto shape = x.shape();
  const long tokens = shape[0] * shape[1], heads = shape[2], Dh = shape[3];
  Tensor y = like(x);
  const float *X = x.data<float>(), *C = cos.data<float>(), *S = sin.data<float>();
  float* Y = y.data<float>();
  parallel(tasks(tokens, ROWS), [&](long t) {
    for (long i = t * ROWS; i < std::min(tokens, (t + 1) * ROWS); i++) PICK(level(), rotate_token)(X + i * heads * Dh, C + i * Dh, S + i * Dh, heads, Dh, sign, Y + i * heads * Dh);
  });
  return {y};
}

std::vector<Tensor> SwiGLU(const Tensor& gate, const Tensor& up) {
  Tensor y = like(gate);
  const long n = gate.numel();
  const float *G = gate.data<float>(), *U = up.data<float>();
  float* Y = y.data<float>();
  parallel(tasks(n, VALUES), [&](long t) { PICK(level(), gate)(G + t * VALUES, U + t * VALUES, std::min(VALUES, n - t * VALUES), Y + t * VALUES); });
  return {y};
}
std::vector<Tensor> SwiGLUBackward(const Tensor& gate, const Tensor& up, const Tensor& dy) {
  Tensor dg = like(gate), du = like(gate);
  const long n = gate.numel();
  const float *G = gate.data<float>(), *U = up.data<float>(), *DY = dy.data<float>();
  float *DG = dg.data<float>(), *DU = du.data<float>();
  parallel(tasks(n, VALUES), [&](long t) {
    const long at = t * VALUES;
    PICK(level(), gate_backward)(G + at, U + at, DY + at, std::min(VALUES, n - at), DG + at, DU + at);
  });
  return {dg, du};
}

static std::vector<Shape> NormShape(const Shape& x, const Shape& w) {
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < x.size(); i++) rows *= x[i];
  return {x, {rows}};
}
static std::vector<Type> NormType(Type x, Type w) { return {x, x}; }
static std::vector<Shape> NormBackwardShape(const Shape& x, const Shape& w, const Shape& r, const Shape& dy) { return {x, w}; }
static std::vector<Type> NormBackwardType(Type x, Type w, Type r, Type dy) { return {x, x}; }
static std::vector<Shape> RopeShape(const Shape& x, const Shape& cos, const Shape& sin) { return {x}; }
static std::vector<Type> RopeType(Type x, Type cos, Type sin) { return {x}; }
static std::vector<Shape> GateShape(const Shape& gate, const Shape& up) { return {gate}; }
static std::vector<Type> GateType(Type gate, Type up) { return {gate}; }
static std::vector<Shape> GateBackwardShape(const Shape& gate, const Shape& up, const Shape& dy) { return {gate, gate}; }
static std::vector<Type> GateBackwardType(Type gate, Type up, Type dy) { return {gate, gate}; }

PD_BUILD_OP(cpu_rms_norm)
    .Inputs({"x", "w"}).Outputs({"y", "r"}).Attrs({"epsilon: float"})
    .SetKernelFn(PD_KERNEL(RmsNorm)).SetInferShapeFn(PD_INFER_SHAPE(NormShape)).SetInferDtypeFn(PD_INFER_DTYPE(NormType));
PD_BUILD_OP(cpu_rms_norm_backward)
    .Inputs({"x", "w", "r", "dy"}).Outputs({"dx", "dw"})
    .SetKernelFn(PD_KERNEL(RmsNormBackward)).SetInferShapeFn(PD_INFER_SHAPE(NormBackwardShape)).SetInferDtypeFn(PD_INFER_DTYPE(NormBackwardType));
PD_BUILD_OP(cpu_rope)
    .Inputs({"x", "cos", "sin"}).Outputs({"y"}).Attrs({"sign: float"})
    .SetKernelFn(PD_KERNEL(Rope)).SetInferShapeFn(PD_INFER_SHAPE(RopeShape)).SetInferDtypeFn(PD_INFER_DTYPE(RopeType));
PD_BUILD_OP(cpu_swiglu)
    .Inputs({"gate", "up"}).Outputs({"y"})
    .SetKernelFn(PD_KERNEL(SwiGLU)).SetInferShapeFn(PD_INFER_SHAPE(GateShape)).SetInferDtypeFn(PD_INFER_DTYPE(GateType));
PD_BUILD_OP(cpu_swiglu_backward)
    .Inputs({"gate", "up", "dy"}).Outputs({"dg", "du"})
    .SetKernelFn(PD_KERNEL(SwiGLUBackward)).SetInferShapeFn(PD_INFER_SHAPE(GateBackwardShape)).SetInferDtypeFn(PD_INFER_DTYPE(GateBackwardType));
