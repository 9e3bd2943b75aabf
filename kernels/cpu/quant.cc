// y = x W + b with W packed to 4 or 8 bits (kernels.quant_linear), for the few rows of a decode step, on the CPU; and
// unpacking of W.
//
// Weights are read as stored, an eighth or a quarter of float32, and unpacked in registers. If all rows of each word
// share a group (always without act order), the codes of a run of words are summed before scaling: y = sum over runs
// of scale (sum_i x_i code_i - zero sum_i x_i).
#include <algorithm>
#include <cstring>
#include <vector>

#include "op.h"
#include "threads.h"

struct Packed {
  long in, out, groups;
  int bits;
  const int* codes;     // (in * bits / 32, out)
  const float* scales;  // (groups, out)
  const int* zeros;     // (groups, out * bits / 32), null: 2^(bits - 1)
  const int* index;     // (in), group of each row; null: equal runs in order
  long group_of(long row) const { return index ? index[row] : row / (in / groups); }
};
struct Run {
  long from, to, group;
};  // rows of words

#define BODY "quant.h"
#include "every_isa.h"

using Shape = std::vector<int64_t>;
using Type = paddle::DataType;
using Maybe = paddle::optional<paddle::Tensor>;
using MaybeShape = paddle::optional<Shape>;
using MaybeType = paddle::optional<Type>;
constexpr long COLUMNS = 128;  // per task

static Packed packed(const paddle::Tensor& codes, const paddle::Tensor& scales, const Maybe& qzeros,
                     const Maybe& g_index, int bits) {
  const Packed w{codes.shape()[0] * (32 / bits),
                 codes.shape()[1],
                 scales.shape()[0],
                 bits,
                 codes.data<int>(),
                 scales.data<float>(),
                 qzeros ? qzeros->data<int>() : nullptr,
                 g_index ? g_index->data<int>() : nullptr};
  PD_CHECK((bits == 4 || bits == 8) && w.out >= 4, "4 or 8 bits, at least four columns");
  PD_CHECK(w.index || w.in % w.groups == 0, "groups of unequal length need g_index");
  PD_CHECK(!qzeros || qzeros->numel() * (32 / bits) == w.groups * w.out, "sizes of scales and qzeros differ");
  for (long i = 0; w.index && i < w.in; i++)
    PD_CHECK(w.index[i] >= 0 && w.index[i] < w.groups, "g_index names a group that is not there");
  return w;
}
// Runs of words of one group; none if the rows of some word have different groups.
static std::vector<Run> runs_of(const Packed& w) {
  const long per_word = 32 / w.bits;
  std::vector<Run> runs;
  if (const long group = w.in / w.groups; !w.index && group % per_word == 0) {
    for (long g = 0; g < w.groups; g++) runs.push_back({g * group / per_word, (g + 1) * group / per_word, g});
    return runs;
  }
  for (long word = 0; word < w.in / per_word; word++) {
    const long g = w.group_of(word * per_word);
    for (long j = 1; j < per_word; j++)
      if (w.group_of(word * per_word + j) != g) return {};
    if (!runs.empty() && runs.back().group == g) runs.back().to++;
    else runs.push_back({word, word + 1, g});
  }
  return runs;
}
static int chosen(int instructions, long out) {  // a vector must not exceed a row
  return std::min({instructions < 0 ? 2 : instructions, level(), out >= 16 ? 2 : out >= 8 ? 1 : 0});
}
static long column_tasks(long out) { return std::max(1L, out / COLUMNS); }
static long column_end(long t, long out) { return t + 1 == column_tasks(out) ? out : (t + 1) * COLUMNS; }

std::vector<paddle::Tensor> QuantLinear(const paddle::Tensor& x, const paddle::Tensor& codes,
                                        const paddle::Tensor& scales, const Maybe& qzeros, const Maybe& g_index,
                                        const Maybe& bias, int bits, int instructions) {
  Packed w = packed(codes, scales, qzeros, g_index, bits);
  Shape shape = x.shape();
  PD_CHECK(shape.back() == w.in, "sizes differ");
  const long rows = x.numel() / w.in;
  shape.back() = w.out;
  auto y = paddle::empty(shape, x.dtype(), x.place());
  const std::vector<Run> runs = runs_of(w);
  std::vector<int> index;
  if (runs.empty() && !w.index) {
    for (long i = 0; i < w.in; i++) index.push_back((int)w.group_of(i));
    w.index = index.data();
  }
  const int how = chosen(instructions, w.out);
  std::vector<float> sums(rows * runs.size());
  const float *X = x.data<float>(), *B = bias ? bias->data<float>() : nullptr;
  for (long m = 0; m < rows; m++) PICK(how, sum_runs)(w, runs, X + m * w.in, sums.data() + m * runs.size());
  float* Y = y.data<float>();
  parallel(column_tasks(w.out), [&](long t) {
    PICK(how, quant_columns)(w, runs, X, sums.data(), B, rows, t * COLUMNS, column_end(t, w.out), Y);
  });
  return {y};
}

std::vector<paddle::Tensor> Dequantize(const paddle::Tensor& codes, const paddle::Tensor& scales, const Maybe& qzeros,
                                       const Maybe& g_index, int bits, int instructions) {
  const Packed w = packed(codes, scales, qzeros, g_index, bits);
  auto y = paddle::empty({w.in, w.out}, scales.dtype(), scales.place());
  const int how = chosen(instructions, w.out);
  float* Y = y.data<float>();
  parallel(column_tasks(w.out), [&](long t) { PICK(how, unpack_columns)(w, t * COLUMNS, column_end(t, w.out), Y); });
  return {y};
}

static std::vector<Shape> QuantShape(const Shape& x, const Shape& codes, const Shape& scales, const MaybeShape& qzeros,
                                     const MaybeShape& g_index, const MaybeShape& bias) {
  Shape y = x;
  y.back() = codes[1];
  return {y};
}
static std::vector<Type> QuantType(Type x, Type codes, Type scales, const MaybeType& qzeros, const MaybeType& g_index,
                                   const MaybeType& bias) {
  return {x};
}

PD_BUILD_OP(cpu_quant_linear)
    .Inputs({"x", "codes", "scales", paddle::Optional("qzeros"), paddle::Optional("g_index"), paddle::Optional("bias")})
    .Outputs({"y"})
    .Attrs({"bits: int", "instructions: int"})
    .SetKernelFn(PD_KERNEL(QuantLinear))
    .SetInferShapeFn(PD_INFER_SHAPE(QuantShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(QuantType));

static std::vector<Shape> DequantizeShape(const Shape& codes, const Shape& scales, const MaybeShape& qzeros,
                                          const MaybeShape& g_index, const int& bits, const int& instructions) {
  return {{codes[0] * (32 / bits), codes[1]}};
}
static std::vector<Type> DequantizeType(Type codes, Type scales, const MaybeType& qzeros, const MaybeType& g_index) {
  return {scales};
}

PD_BUILD_OP(cpu_dequantize)
    .Inputs({"codes", "scales", paddle::Optional("qzeros"), paddle::Optional("g_index")})
    .Outputs({"y"})
    .Attrs({"bits: int", "instructions: int"})
    .SetKernelFn(PD_KERNEL(Dequantize))
    .SetInferShapeFn(PD_INFER_SHAPE(DequantizeShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(DequantizeType));
