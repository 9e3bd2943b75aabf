// y = x W + b for the few rows of a decode step. Bound by reading W (float32 or bfloat16), which is read once, 64 rows
// at a time. x is transposed first, so that the factors of one weight row are contiguous.
//
// The sum over input rows is in their order, for any number of threads.
#include <algorithm>
#include <cstring>
#include <vector>

#include "op.h"
#include "threads.h"

struct Few {
  long rows, in, out;
  const float* bias;
};
static inline float as_float(float x) { return x; }
static inline float as_float(uint16_t x) {
  const uint32_t bits = (uint32_t)x << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

#define BODY "few_rows.h"
#include "every_isa.h"

std::vector<paddle::Tensor> FewRows(const paddle::Tensor& x, const paddle::Tensor& w,
                                    const paddle::optional<paddle::Tensor>& bias, int instructions) {
  auto shape = x.shape();
  const Few f{x.numel() / shape.back(), w.shape()[0], w.shape()[1], bias ? bias->data<float>() : nullptr};
  PD_CHECK(shape.back() == f.in, "x has ", shape.back(), " columns, the weight ", f.in, " rows");
  shape.back() = f.out;
  auto y = paddle::empty(shape, x.dtype(), x.place());
  const float* X = x.data<float>();
  std::vector<float> transposed(f.rows > 1 ? f.rows * f.in : 0);
  for (long m = 0; m < (f.rows > 1 ? f.rows : 0); m++)
    for (long k = 0; k < f.in; k++) transposed[k * f.rows + m] = X[m * f.in + k];
  const float* by_columns = f.rows > 1 ? transposed.data() : X;
  float* Y = y.data<float>();
  const bool half = w.dtype() == paddle::DataType::BFLOAT16;
  const void* W = w.data();
  const int which = instructions < 0 ? level() : std::min(instructions, level());
  const long part = f.out >= 768 ? 384 : 144;  // columns per task: whole tiles of every instruction set
  const auto columns = [&](long t) {
    const long from = t * part, to = std::min(f.out, from + part);
    if (half) PICK(which, few_bfloat16)(f, W, by_columns, from, to, Y);
    else PICK(which, few_float)(f, W, by_columns, from, to, Y);
  };
  const long tasks = (f.out + part - 1) / part;
  if (f.rows * f.in * f.out < (1 << 17))
    for (long t = 0; t < tasks; t++) columns(t);
  else parallel(tasks, columns);
  return {y};
}

static std::vector<std::vector<int64_t>> FewShape(const std::vector<int64_t>& x, const std::vector<int64_t>& w,
                                                  const paddle::optional<std::vector<int64_t>>& bias) {
  auto y = x;
  y.back() = w[1];
  return {y};
}
static std::vector<paddle::DataType> FewType(paddle::DataType x, paddle::DataType w,
                                             const paddle::optional<paddle::DataType>& bias) {
  return {x};
}

PD_BUILD_OP(cpu_few_rows_linear)
    .Inputs({"x", "w", paddle::Optional("bias")})
    .Outputs({"y"})
    .Attrs({"instructions: int"})
    .SetKernelFn(PD_KERNEL(FewRows))
    .SetInferShapeFn(PD_INFER_SHAPE(FewShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(FewType));
