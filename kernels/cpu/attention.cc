// Attention with FlashMask rows on the CPU: forward and backward in tiles, memory linear in T, masked tiles skipped.
//
// Products in float32 for every instruction set, or in bfloat16. q (B, Tq, H, Dh), k and v (B, Tk, K, Dh), float32;
// rows int32 (B, 1 | K | H, Tk, n), see kernels.attention. Saved for backward: q, k, v, out and lse (B, H, Tq). The
// order of every sum depends on shapes, not on threads.
#include <immintrin.h>

#include <algorithm>
#include <array>
#include <climits>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "amx.h"
#include "op.h"
#include "threads.h"

struct Shape {
  long B, Tq, Tk, H, K, Dh, n;  // n: columns of mask rows, 0 if there are none
  long row_heads;               // heads of the mask rows: 1, K or H
  long q_stride, k_stride;      // floats from one token to the next: H * Dh, K * Dh
  bool causal;
  float scale, softcap;  // softcap: 0 means none
  long offset;           // query i has row i + offset
};
struct Range {
  int least, most;
};  // of one column of mask rows over a block of keys
struct Interval {
  int start, stop;
};  // columns of the hidden rows [start, stop); -1: open end
class Room {  // uninitialized words of 4 bytes, aligned to a cache line
 public:
  explicit Room(size_t n) : p_(std::aligned_alloc(64, (n * 4 + 64) / 64 * 64)) {}
  Room(const Room&) = delete;
  ~Room() { std::free(p_); }
  template <class T>
  T* at(size_t i) const {
    return (T*)p_ + i;
  }

 private:
  void* p_;
};

static inline int parts(const Shape& s) { return s.n == 4 || (s.n == 2 && !s.causal) ? 2 : 1; }
static inline Interval interval(const Shape& s, int part) {
  if (s.n == 1) return {0, -1};
  if (s.n == 4) return part ? Interval{2, 3} : Interval{0, 1};
  if (s.causal) return {0, 1};
  return part ? Interval{-1, 1} : Interval{0, -1};
}

#define BODY "attention_single.h"
#include "every_isa.h"

#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")
namespace half {
#define VL 16
#define NV 4
#define MR 6
#include "simd.h"
#undef MR
#include "gemm.h"
#include "attention_half.h"
#undef VL
#undef NV
}  // namespace half
#pragma GCC pop_options
// Value of the ops' attribute `instructions` for products in bfloat16; other values are levels of every_isa.h.
constexpr int HALF = 3;

static Shape shape_of(const paddle::Tensor& q, const paddle::Tensor& k, const paddle::optional<paddle::Tensor>& rows,
                      bool causal, float scale, float softcap, long offset) {
  const auto a = q.shape(), b = k.shape();
  Shape s{a[0], a[1], b[1], a[2], b[2], a[3], 0, 1, a[2] * a[3], b[2] * b[3], causal, scale, softcap, offset};
  if (rows) s.n = rows->shape()[3], s.row_heads = rows->shape()[1];
  return s;
}

std::vector<paddle::Tensor> AttentionForward(const paddle::Tensor& q, const paddle::Tensor& k, const paddle::Tensor& v,
                                             const paddle::optional<paddle::Tensor>& rows,
                                             const paddle::optional<paddle::Tensor>& slopes, bool causal, float scale,
                                             float softcap, int offset, int instructions) {
  const Shape s = shape_of(q, k, rows, causal, scale, softcap, offset);
  auto out = paddle::empty(q.shape(), q.dtype(), q.place());
  auto lse = paddle::empty({s.B, s.H, s.Tq}, q.dtype(), q.place());
  const int* r = rows ? rows->data<int>() : nullptr;
  const float* a = slopes ? slopes->data<float>() : nullptr;
  const int which = instructions < 0 ? level() : std::min(instructions, level());
  (instructions == HALF ? half::forward : PICK(which, forward))(s, q.data<float>(), k.data<float>(), v.data<float>(), r,
                                                                a, out.data<float>(), lse.data<float>());
  return {out, lse};
}

std::vector<paddle::Tensor> AttentionBackward(const paddle::Tensor& q, const paddle::Tensor& k, const paddle::Tensor& v,
                                              const paddle::optional<paddle::Tensor>& rows,
                                              const paddle::optional<paddle::Tensor>& slopes, const paddle::Tensor& out,
                                              const paddle::Tensor& lse, const paddle::Tensor& d_out, bool causal,
                                              float scale, float softcap, int offset, int instructions) {
  const Shape s = shape_of(q, k, rows, causal, scale, softcap, offset);
  auto d_q = paddle::empty(q.shape(), q.dtype(), q.place());
  auto d_k = paddle::empty(k.shape(), q.dtype(), q.place()), d_v = paddle::empty(k.shape(), q.dtype(), q.place());
  const int* r = rows ? rows->data<int>() : nullptr;
  const float* a = slopes ? slopes->data<float>() : nullptr;
  const int which = instructions < 0 ? level() : std::min(instructions, level());
  (instructions == HALF ? half::backward : PICK(which, backward))(
      s, q.data<float>(), k.data<float>(), v.data<float>(), r, a, out.data<float>(), lse.data<float>(),
      d_out.data<float>(), d_q.data<float>(), d_k.data<float>(), d_v.data<float>());
  return {d_q, d_k, d_v};
}

static std::vector<std::vector<int64_t>> ForwardShape(const std::vector<int64_t>& q, const std::vector<int64_t>& k,
                                                      const std::vector<int64_t>& v,
                                                      const paddle::optional<std::vector<int64_t>>& rows,
                                                      const paddle::optional<std::vector<int64_t>>& slopes) {
  return {q, {q[0], q[2], q[1]}};
}
static std::vector<paddle::DataType> ForwardType(paddle::DataType q, paddle::DataType k, paddle::DataType v,
                                                 const paddle::optional<paddle::DataType>& rows,
                                                 const paddle::optional<paddle::DataType>& slopes) {
  return {q, q};
}

PD_BUILD_OP(cpu_attention)
    .Inputs({"q", "k", "v", paddle::Optional("rows"), paddle::Optional("slopes")})
    .Outputs({"out", "lse"})
    .Attrs({"causal: bool", "scale: float", "softcap: float", "offset: int", "instructions: int"})
    .SetKernelFn(PD_KERNEL(AttentionForward))
    .SetInferShapeFn(PD_INFER_SHAPE(ForwardShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(ForwardType));

static std::vector<std::vector<int64_t>> BackwardShape(const std::vector<int64_t>& q, const std::vector<int64_t>& k,
                                                       const std::vector<int64_t>& v,
                                                       const paddle::optional<std::vector<int64_t>>& rows,
                                                       const paddle::optional<std::vector<int64_t>>& slopes,
                                                       const std::vector<int64_t>& out, const std::vector<int64_t>& lse,
                                                       const std::vector<int64_t>& d_out) {
  return {q, k, v};
}
static std::vector<paddle::DataType> BackwardType(paddle::DataType q, paddle::DataType k, paddle::DataType v,
                                                  const paddle::optional<paddle::DataType>& rows,
                                                  const paddle::optional<paddle::DataType>& slopes,
                                                  paddle::DataType out, paddle::DataType lse, paddle::DataType d_out) {
  return {q, k, v};
}

PD_BUILD_OP(cpu_attention_backward)
    .Inputs({"q", "k", "v", paddle::Optional("rows"), paddle::Optional("slopes"), "out", "lse", "d_out"})
    .Outputs({"d_q", "d_k", "d_v"})
    .Attrs({"causal: bool", "scale: float", "softcap: float", "offset: int", "instructions: int"})
    .SetKernelFn(PD_KERNEL(AttentionBackward))
    .SetInferShapeFn(PD_INFER_SHAPE(BackwardShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(BackwardType));
