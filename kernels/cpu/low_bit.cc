// Codes with a table of values and a scale per block (kernels.dequantize_table) -> a weight in float32, on the CPU.
//
// The weight is (out, in), flat; a byte holds one code, or two with the first in the high bits. A task decodes ROWS
// rows into a buffer that stays in the cache, and writes them as they are or as columns of (in, out).
#include <algorithm>
#include <vector>

#include "op.h"
#include "threads.h"

using Shape = std::vector<int64_t>;
using Type = paddle::DataType;
constexpr long ROWS = 16;

struct Blocks {
  const uint8_t* codes;
  const float *scales, *values;  // values (256, per_byte)
  long per_byte, size;           // weights of a byte, of a block
};

static void decode(const Blocks& w, long from, long to, float* y) {
  for (long k = from; k < to;) {
    const long end = std::min(to, (k / w.size + 1) * w.size);
    const float scale = w.scales[k / w.size];
    if (w.per_byte == 1) {
      for (; k < end; k++) *y++ = w.values[w.codes[k]] * scale;
      continue;
    }
    if (k % 2 && k < end) *y++ = w.values[2 * w.codes[k / 2] + 1] * scale, k++;
    for (; k + 1 < end; k += 2, y += 2) {
      const float* pair = w.values + 2 * w.codes[k / 2];
      y[0] = pair[0] * scale, y[1] = pair[1] * scale;
    }
    if (k < end) *y++ = w.values[2 * w.codes[k / 2]] * scale, k++;
  }
}

std::vector<paddle::Tensor> DequantizeTable(const paddle::Tensor& codes, const paddle::Tensor& scales,
                                            const paddle::Tensor& values, int n_in, int n_out, bool transposed,
                                            int instructions) {
  const long in = n_in, out = n_out, per_byte = values.shape()[1], blocks = scales.numel();
  const long size = codes.numel() * per_byte / std::max(blocks, 1L);
  PD_CHECK((per_byte == 1 || per_byte == 2) && values.shape()[0] == 256, "values are (256, 1) or (256, 2)");
  PD_CHECK(blocks > 0 && size * blocks >= in * out && (size * blocks + per_byte - 1) / per_byte == codes.numel(),
           "sizes of codes and scales differ");
  const Blocks w{codes.data<uint8_t>(), scales.data<float>(), values.data<float>(), per_byte, size};
  auto y = paddle::empty(transposed ? Shape{out, in} : Shape{in, out}, scales.dtype(), scales.place());
  float* Y = y.data<float>();
  parallel((out + ROWS - 1) / ROWS, [&](long task) {
    const long first = task * ROWS, rows = std::min(ROWS, out - first);
    if (transposed) return decode(w, first * in, (first + rows) * in, Y + first * in);
    std::vector<float> buffer(rows * in);
    decode(w, first * in, (first + rows) * in, buffer.data());
    for (long i = 0; i < in; i++)
      for (long r = 0; r < rows; r++) Y[i * out + first + r] = buffer[r * in + i];
  });
  return {y};
}

static std::vector<Shape> TableShape(const Shape& codes, const Shape& scales, const Shape& values, const int& n_in,
                                     const int& n_out, const bool& transposed, const int& instructions) {
  return {transposed ? Shape{n_out, n_in} : Shape{n_in, n_out}};
}
static std::vector<Type> TableType(Type codes, Type scales, Type values) { return {scales}; }

PD_BUILD_OP(cpu_dequantize_table)
    .Inputs({"codes", "scales", "values"})
    .Outputs({"y"})
    .Attrs({"n_in: int", "n_out: int", "transposed: bool", "instructions: int"})
    .SetKernelFn(PD_KERNEL(DequantizeTable))
    .SetInferShapeFn(PD_INFER_SHAPE(TableShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(TableType));
