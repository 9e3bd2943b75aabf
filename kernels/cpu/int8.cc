// The operator of kernels.quant_linear with scheme a8w8 on the CPU; the work is in int8.h.
#include "int8.h"

#include "op.h"

using Shape = std::vector<int64_t>;
using Type = paddle::DataType;
using Maybe = paddle::optional<paddle::Tensor>;

extern "C" int cpu_int8_way(long rows) { return int8::best(rows); }  // for a test: the method that is used here

// instructions: a method of int8.h, for tests; -1 the best.
std::vector<paddle::Tensor> Int8Product(const paddle::Tensor& x, const paddle::Tensor& weight,
                                        const paddle::Tensor& scales, const Maybe& bias, const Maybe& input_scale,
                                        int instructions) {
  Shape shape = x.shape();
  const long in = weight.shape()[0], out = weight.shape()[1], rows = x.numel() / std::max(1L, in);
  PD_CHECK(shape.back() == in && scales.numel() == out, "sizes differ");
  PD_CHECK(in < 131072, "sums of so many products of int8 may not fit in 32 bits");
  shape.back() = out;
  auto y = paddle::empty(shape, x.dtype(), x.place());
  const int best = int8::best(rows), how = instructions < 0 ? best : std::min(instructions, int8::best(1L << 20));
  int8::linear(
      {rows, in, out, x.data<float>(), weight.data<int8_t>(), scales.data<float>(),
       bias ? bias->data<float>() : nullptr, input_scale ? input_scale->data<float>() : nullptr, y.data<float>()},
      how);
  return {y};
}
static std::vector<Shape> Int8Shape(const Shape& x, const Shape& weight, const Shape& scales,
                                    const paddle::optional<Shape>& bias, const paddle::optional<Shape>& input_scale) {
  Shape y = x;
  y.back() = weight[1];
  return {y};
}
static std::vector<Type> Int8Type(Type x, Type weight, Type scales, const paddle::optional<Type>& bias,
                                  const paddle::optional<Type>& input_scale) {
  return {x};
}

PD_BUILD_OP(cpu_int8_linear)
    .Inputs({"x", "weight", "scales", paddle::Optional("bias"), paddle::Optional("input_scale")})
    .Outputs({"y"})
    .Attrs({"instructions: int"})
    .SetKernelFn(PD_KERNEL(Int8Product))
    .SetInferShapeFn(PD_INFER_SHAPE(Int8Shape))
    .SetInferDtypeFn(PD_INFER_DTYPE(Int8Type));
