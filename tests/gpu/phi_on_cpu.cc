// Paddle's operators that only its GPU build can run, registered for the CPU: slow, in the words of their
// documentation.
//
// They give the calls of kernels/gpu.py something to run, and Paddle's own shape inference, which asks for a kernel of
// the type first, something to infer with. attention: forward alone. The inference itself, and every check of
// arguments, is Paddle's.
#include <cmath>
#include <string>
#include <vector>

#include "paddle/phi/core/kernel_registry.h"

namespace phi {

using Maybe = paddle::optional<DenseTensor>;

template <typename T>
static float value(const DenseTensor& x, int64_t at) {
  return static_cast<float>(x.data<T>()[at]);
}

// rows: startend_row_indices or null. hidden: what its columns say of query row i and a key.
static bool hidden(const int* r, int columns, bool causal, int64_t i) {
  if (causal) return columns == 1 ? i >= r[0] : i >= r[0] && i < r[1];
  return columns == 2 ? i >= r[0] || i < r[1] : (i >= r[0] && i < r[1]) || (i >= r[2] && i < r[3]);
}

template <typename T, typename Context>
static void attend(const Context& context, const DenseTensor& q, const DenseTensor& k, const DenseTensor& v,
                   const DenseTensor* rows, float scale, bool causal, DenseTensor* out) {
  T* O = context.template Alloc<T>(out);
  const int64_t B = q.dims()[0], Tq = q.dims()[1], H = q.dims()[2], Dh = q.dims()[3], Tk = k.dims()[1], K = k.dims()[2];
  for (int64_t b = 0; b < B; b++)
    for (int64_t i = 0; i < Tq; i++)
      for (int64_t h = 0; h < H; h++) {
        std::vector<float> sum(Dh, 0.0f);
        float weights = 0.0f;
        for (int64_t j = 0; j < Tk; j++) {
          if (causal && j > i + Tk - Tq) continue;
          if (rows) {
            const int64_t heads = rows->dims()[1], n = rows->dims()[3];
            if (hidden(rows->data<int>() + ((b * heads + h * heads / H) * Tk + j) * n, n, causal, i)) continue;
          }
          float score = 0.0f;
          const int64_t key = ((b * Tk + j) * K + h * K / H) * Dh;
          for (int64_t d = 0; d < Dh; d++) score += value<T>(q, ((b * Tq + i) * H + h) * Dh + d) * value<T>(k, key + d);
          const float p = std::exp(score * scale);
          weights += p;
          for (int64_t d = 0; d < Dh; d++) sum[d] += p * value<T>(v, key + d);
        }
        for (int64_t d = 0; d < Dh; d++)
          O[((b * Tq + i) * H + h) * Dh + d] = static_cast<T>(weights > 0.0f ? sum[d] / weights : 0.0f);
      }
}

template <typename T, typename C>
void FlashAttn(const C& context, const DenseTensor& q, const DenseTensor& k, const DenseTensor& v, const Maybe&,
               const Maybe&, float, bool causal, bool, bool, const std::string&, DenseTensor* out, DenseTensor*,
               DenseTensor*, DenseTensor*) {
  attend<T>(context, q, k, v, nullptr, 1.0f / std::sqrt(static_cast<float>(q.dims()[3])), causal, out);
}
template <typename T, typename C>
void FlashMask(const C& context, const DenseTensor& q, const DenseTensor& k, const DenseTensor& v,
               const DenseTensor& rows, const Maybe&, float, bool causal, bool, bool, const std::string&,
               DenseTensor* out, DenseTensor*, DenseTensor*, DenseTensor*) {
  attend<T>(context, q, k, v, &rows, 1.0f / std::sqrt(static_cast<float>(q.dims()[3])), causal, out);
}
template <typename T, typename C>
void FlashMask2(const C& context, const DenseTensor& q, const DenseTensor& k, const DenseTensor& v,
                const DenseTensor& rows, const Maybe&, const float scale, bool causal, DenseTensor* out, DenseTensor*) {
  attend<T>(context, q, k, v, &rows, scale, causal, out);
}

// Pairs are halves apart; sin and cos (1, rows, 1, Dh); a token's row is its position, or its place in the sequence.
template <typename T, typename C>
static void rotate(const C& context, const DenseTensor& x, const DenseTensor& sin, const DenseTensor& cos,
                   const Maybe& positions, bool neighbours, float sign, DenseTensor* out) {
  T* O = context.template Alloc<T>(out);
  const int64_t B = x.dims()[0], tokens = x.dims()[1], heads = x.dims()[2], Dh = x.dims()[3];
  PADDLE_ENFORCE_EQ(neighbours, false, common::errors::Unimplemented("only halves"));
  PADDLE_ENFORCE_EQ(cos.dims()[0] == 1 && cos.dims()[2] == 1 && cos.dims()[3] == Dh, true,
                    common::errors::InvalidArgument("tables"));
  PADDLE_ENFORCE_EQ(positions ? cos.dims()[1] >= tokens : cos.dims()[1] == tokens, true,
                    common::errors::InvalidArgument("rows of the tables"));
  for (int64_t b = 0; b < B; b++)
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t h = 0; h < heads; h++)
        for (int64_t d = 0; d < Dh; d++) {
          const int64_t row = positions ? positions->data<int64_t>()[b * tokens + t] : t,
                        at = ((b * tokens + t) * heads + h) * Dh, other = d < Dh / 2 ? d + Dh / 2 : d - Dh / 2;
          const float turned = d < Dh / 2 ? -value<T>(x, at + other) : value<T>(x, at + other);
          O[at + d] = static_cast<T>(value<T>(x, at + d) * value<T>(cos, row * Dh + d) +
                                     sign * turned * value<T>(sin, row * Dh + d));
        }
}
template <typename T, typename C>
void Rope(const C& context, const DenseTensor& q, const Maybe&, const Maybe&, const Maybe& sin, const Maybe& cos,
          const Maybe& positions, bool neighbours, bool, float, DenseTensor* out, DenseTensor*, DenseTensor*) {
  rotate<T>(context, q, *sin, *cos, positions, neighbours, 1.0f, out);
}
template <typename T, typename C>
void RopeGrad(const C& context, const Maybe& sin, const Maybe& cos, const Maybe& positions, const DenseTensor& d_out,
              const Maybe&, const Maybe&, bool neighbours, bool, float, DenseTensor* d_q, DenseTensor*, DenseTensor*) {
  rotate<T>(context, d_out, *sin, *cos, positions, neighbours, -1.0f, d_q);
}

// For its shapes alone: kernels/gpu.py does not use it, see there.
template <typename T, typename C>
void WeightOnly(const C&, const DenseTensor&, const DenseTensor&, const Maybe&, const DenseTensor&, const std::string&,
                const int, const int, DenseTensor*) {}

}  // namespace phi

PD_REGISTER_KERNEL(weight_only_linear, CPU, ALL_LAYOUT, phi::WeightOnly, phi::dtype::float16, phi::dtype::bfloat16) {}
PD_REGISTER_KERNEL(flash_attn, CPU, ALL_LAYOUT, phi::FlashAttn, phi::dtype::float16, phi::dtype::bfloat16) {}
PD_REGISTER_KERNEL(flashmask_attention, CPU, ALL_LAYOUT, phi::FlashMask, phi::dtype::float16, phi::dtype::bfloat16) {}
PD_REGISTER_KERNEL(flashmask_attention_v2, CPU, ALL_LAYOUT, phi::FlashMask2, phi::dtype::float16,
                   phi::dtype::bfloat16) {}
PD_REGISTER_KERNEL(fused_rotary_position_embedding, CPU, ALL_LAYOUT, phi::Rope, float, phi::dtype::float16,
                   phi::dtype::bfloat16) {}
PD_REGISTER_KERNEL(fused_rotary_position_embedding_grad, CPU, ALL_LAYOUT, phi::RopeGrad, float, phi::dtype::float16,
                   phi::dtype::bfloat16) {}
