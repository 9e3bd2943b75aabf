// Codes with a table of values and a scale per block (kernels.dequantize_table) -> a weight in float32 or bfloat16, on
// the CPU.
//
// The weight is (out, in), flat; a byte holds one code, or two with the first in the high bits. A task decodes ROWS
// rows: in place, or into a buffer that stays in the cache and is written as columns of (in, out). With AVX-512, 16
// codes of 4 bits are one permutation of the table.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "op.h"
#include "threads.h"

using Shape = std::vector<int64_t>;
using Type = paddle::DataType;
constexpr long ROWS = 16;

struct Blocks {
  const uint8_t* codes;
  const float *scales, *values;  // values (256) or (16)
  long per_byte, size;           // weights of a byte, of a block
  float value(long k) const {
    return per_byte == 1 ? values[codes[k]] : values[k % 2 ? codes[k / 2] & 15 : codes[k / 2] >> 4];
  }
};

#define BODY "low_bit.h"
#include "every_isa.h"

std::vector<paddle::Tensor> DequantizeTable(const paddle::Tensor& codes, const paddle::Tensor& scales,
                                            const paddle::Tensor& values, int n_in, int n_out, bool transposed,
                                            bool half, int instructions) {
  const long in = n_in, out = n_out, per_byte = values.numel() == 256 ? 1 : 2, blocks = scales.numel();
  const long size = codes.numel() * per_byte / std::max(blocks, 1L);
  PD_CHECK(values.numel() == 256 || values.numel() == 16, "values are (256) or (16)");
  PD_CHECK(blocks > 0 && size * blocks >= in * out && (size * blocks + per_byte - 1) / per_byte == codes.numel(),
           "sizes of codes and scales differ");
  const Blocks w{codes.data<uint8_t>(), scales.data<float>(), values.data<float>(), per_byte, size};
  auto y = paddle::empty(transposed ? Shape{out, in} : Shape{in, out}, half ? Type::BFLOAT16 : Type::FLOAT32,
                         scales.place());
  const int at = level(instructions);
  PICK(at, dequantize)(w, in, out, transposed, half, y.data());
  return {y};
}

static std::vector<Shape> TableShape(const Shape& codes, const Shape& scales, const Shape& values, const int& n_in,
                                     const int& n_out, const bool& transposed, const bool& half,
                                     const int& instructions) {
  return {transposed ? Shape{n_out, n_in} : Shape{n_in, n_out}};
}

PD_BUILD_OP(cpu_dequantize_table)
    .Inputs({"codes", "scales", "values"})
    .Outputs({"y"})
    .Attrs({"n_in: int", "n_out: int", "transposed: bool", "half: bool", "instructions: int"})
    .SetKernelFn(PD_KERNEL(DequantizeTable))
    .SetInferShapeFn(PD_INFER_SHAPE(TableShape));
