// y = x W with W packed to 4 or 8 bits (kernels.quant_linear), for the few rows of a decode step, on the CPU; and W unpacked.
//
// The weights are read as they are stored, an eighth or a quarter of float32, and unpacked in registers. Groups are runs of
// input rows. A group's codes are summed first: y = sum over groups of scale (sum_i x_i code_i - zero sum_i x_i).
#include <algorithm>
#include <cstring>

#include "op.h"
#include "threads.h"

struct Packed {
  long in, out, groups, group;
  int bits;
  const int* codes;     // (in * bits / 32, out)
  const float *scales;  // (groups, out)
  const float *zeros;   // (groups, out)
};

#define BODY "quant.h"
#include "every_isa.h"

static std::vector<float> unpack_zeros(const int* packed, long groups, long out, int bits) {
  const int per_word = 32 / bits, mask = (1 << bits) - 1;
  std::vector<float> zeros(groups * out);
  for (long i = 0; i < groups * out; i++)  // stored less one
    zeros[i] = (((packed[i / per_word] >> (i % per_word * bits)) & mask) + 1) & mask;
  return zeros;
}

std::vector<paddle::Tensor> QuantLinear(const paddle::Tensor& x, const paddle::Tensor& codes, const paddle::Tensor& scales, const paddle::Tensor& qzeros, int bits, int group) {
  const long rows = x.shape()[0], in = x.shape()[1], out = codes.shape()[1], groups = scales.shape()[0];
  auto y = paddle::empty({rows, out}, x.dtype(), x.place());
  const std::vector<float> zeros = unpack_zeros(qzeros.data<int>(), groups, out, bits);
  std::vector<float> sums(rows * groups, 0.0f);
  const float* X = x.data<float>();
  for (long m = 0; m < rows; m++)
    for (long i = 0; i < in; i++) sums[m * groups + i / group] += X[m * in + i];
  const Packed w{in, out, groups, group, bits, codes.data<int>(), scales.data<float>(), zeros.data()};
  float* Y = y.data<float>();
  parallel((out + 127) / 128, [&](long t) { PICK(level(), quant_columns)(w, X, sums.data(), rows, t * 128, std::min(out, (t + 1) * 128), Y); });
  return {y};
}

std::vector<paddle::Tensor> Dequantize(const paddle::Tensor& codes, const paddle::Tensor& scales, const paddle::Tensor& qzeros, int bits, int group) {
  const long words = codes.shape()[0], per_word = 32 / bits, out = codes.shape()[1], groups = scales.shape()[0];
  auto y = paddle::empty({words * per_word, out}, scales.dtype(), scales.place());
  const std::vector<float> zeros = unpack_zeros(qzeros.data<int>(), groups, out, bits);
  const Packed w{words * per_word, out, groups, group, bits, codes.data<int>(), scales.data<float>(), zeros.data()};
  float* Y = y.data<float>();
  parallel(words, [&](long word) { PICK(level(), unpack_word_row)(w, word, Y + word * per_word * out); });
  return {y};
}

static std::vector<std::vector<int64_t>> QuantShape(const std::vector<int64_t>& x, const std::vector<int64_t>& codes, const std::vector<int64_t>& scales, const std::vector<int64_t>& qzeros) {
  return {{x[0], codes[1]}};
}
static std::vector<paddle::DataType> QuantType(paddle::DataType x, paddle::DataType codes, paddle::DataType scales, paddle::DataType qzeros) { return {x}; }

PD_BUILD_OP(cpu_quant_linear)
    .Inputs({"x", "codes", "scales", "qzeros"})
    .Outputs({"y"})
    .Attrs({"bits: int", "group: int"})
    .SetKernelFn(PD_KERNEL(QuantLinear))
    .SetInferShapeFn(PD_INFER_SHAPE(QuantShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(QuantType));

static std::vector<std::vector<int64_t>> DequantizeShape(const std::vector<int64_t>& codes, const std::vector<int64_t>& scales, const std::vector<int64_t>& qzeros, const int& bits,
                                                         const int& group) {
  return {{codes[0] * (32 / bits), codes[1]}};
}
static std::vector<paddle::DataType> DequantizeType(paddle::DataType codes, paddle::DataType scales, paddle::DataType qzeros) { return {scales}; }

PD_BUILD_OP(cpu_dequantize)
    .Inputs({"codes", "scales", "qzeros"})
    .Outputs({"y"})
    .Attrs({"bits: int", "group: int"})
    .SetKernelFn(PD_KERNEL(Dequantize))
    .SetInferShapeFn(PD_INFER_SHAPE(DequantizeShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(DequantizeType));
