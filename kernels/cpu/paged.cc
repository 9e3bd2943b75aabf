// Attention of several sequences whose keys and values are in blocks of a pool (Kwon et al., arXiv 2309.06180), read
// in place; and writing of new keys and values. Caches are float32, bfloat16, or int8 with a scale per slot
// and head.
//
// Decode (one query): a task is 256 keys of some key/value heads, whose query heads share the loads; partial results
// are merged in order. Prefill (several queries): tiles of 64 (query, head) rows by 64 keys, online softmax (Dao, arXiv
// 2307.08691). Tasks depend only on shapes, so the number of threads does not change a bit.
#include <immintrin.h>

#include <algorithm>
#include <climits>
#include <cmath>
#include <cstring>
#include <vector>

#include "op.h"
#include "paged_op.h"
#include "threads.h"

// Below this number of multiplications, waking another thread costs more than it saves.
constexpr double SMALL = 1 << 16;

#define BODY "paged.h"
#include "every_isa.h"

void paged_attend(const Paged& a, CacheType type, int which) {
  if (type == CACHE_INT8) PICK(which, attend_int8)(a);
  else if (type == CACHE_BFLOAT16) PICK(which, attend_bfloat16)(a);
  else PICK(which, attend_float)(a);
}

void write_slot(const float* x, long K, long Dh, long slot, void* cache, float* scales, bool fixed, CacheType type,
                int which) {
  const long at = slot * K * Dh;
  if (type == CACHE_FLOAT) std::memcpy((float*)cache + at, x, K * Dh * sizeof(float));
  if (type == CACHE_BFLOAT16) PICK(which, round_to_bfloat16)(x, K * Dh, (uint16_t*)cache + at);
  if (type == CACHE_INT8)
    for (long h = 0; h < K; h++)
      PICK(which, round_head)(x + h * Dh, Dh, (int8_t*)cache + at + h * Dh, scales + slot * K + h, fixed);
}
static CacheType type_of(const paddle::Tensor& cache) {
  if (cache.dtype() == paddle::DataType::INT8) return CACHE_INT8;
  return cache.dtype() == paddle::DataType::BFLOAT16 ? CACHE_BFLOAT16 : CACHE_FLOAT;
}

std::vector<paddle::Tensor> PagedAttention(const paddle::Tensor& q, const paddle::Tensor& k, const paddle::Tensor& v,
                                           const paddle::Tensor& tables, const paddle::Tensor& lengths,
                                           const paddle::optional<paddle::Tensor>& k_scales,
                                           const paddle::optional<paddle::Tensor>& v_scales,
                                           const paddle::optional<paddle::Tensor>& slopes, float scale, int window,
                                           float softcap, int instructions) {
  const auto of_q = q.shape(), of_k = k.shape();
  auto out = paddle::empty(of_q, q.dtype(), q.place());
  Paged a{tables.shape()[0],
          of_q[1],
          of_k[2],
          of_q[2],
          of_k[1],
          tables.shape()[1],
          scale,
          q.data<float>(),
          k.data(),
          v.data(),
          nullptr,
          nullptr,
          tables.data<int>(),
          lengths.data<int>(),
          lengths.data<int>() + tables.shape()[0],
          nullptr,
          out.data<float>(),
          slopes ? slopes->data<float>() : nullptr,
          window ? window : INT_MAX,
          softcap};
  if (k_scales) a.k_scales = k_scales->data<float>(), a.v_scales = v_scales->data<float>();
  std::vector<long> first(a.S, 0);
  for (long s = 1; s < a.S; s++) first[s] = first[s - 1] + a.queries[s - 1];
  a.first = first.data();
  for (long s = 0; s < a.S; s++)
    for (long b = a.seen_from(s, 0) / a.block_size; b * a.block_size < a.contexts[s]; b++)
      PD_CHECK(a.tables[s * a.width + b] >= 0 && a.tables[s * a.width + b] < of_k[0], "block ",
               a.tables[s * a.width + b], " of sequence ", s, " is not one of ", of_k[0]);
  const int which = instructions < 0 ? level() : std::min(instructions, level());
  paged_attend(a, type_of(k), which);
  return {out};
}

static std::vector<std::vector<int64_t>> PagedShape(const std::vector<int64_t>& q, const std::vector<int64_t>& k,
                                                    const std::vector<int64_t>& v, const std::vector<int64_t>& tables,
                                                    const std::vector<int64_t>& lengths,
                                                    const paddle::optional<std::vector<int64_t>>& k_scales,
                                                    const paddle::optional<std::vector<int64_t>>& v_scales,
                                                    const paddle::optional<std::vector<int64_t>>& slopes) {
  return {q};
}
static std::vector<paddle::DataType> PagedType(paddle::DataType q, paddle::DataType k, paddle::DataType v,
                                               paddle::DataType tables, paddle::DataType lengths,
                                               const paddle::optional<paddle::DataType>& k_scales,
                                               const paddle::optional<paddle::DataType>& v_scales,
                                               const paddle::optional<paddle::DataType>& slopes) {
  return {q};
}

PD_BUILD_OP(cpu_paged_attention)
    .Inputs({"q", "k", "v", "tables", "lengths", paddle::Optional("k_scales"), paddle::Optional("v_scales"),
             paddle::Optional("slopes")})
    .Outputs({"out"})
    .Attrs({"scale: float", "window: int", "softcap: float", "instructions: int"})
    .SetKernelFn(PD_KERNEL(PagedAttention))
    .SetInferShapeFn(PD_INFER_SHAPE(PagedShape))
    .SetInferDtypeFn(PD_INFER_DTYPE(PagedType));

// k and v (N, K, Dh) into rows `slots` (N,) of the caches, in place; rounded if the caches are int8.
void WriteCache(const paddle::Tensor& k, const paddle::Tensor& v, paddle::Tensor& k_cache, paddle::Tensor& v_cache,
                const paddle::Tensor& slots, paddle::optional<paddle::Tensor>& k_scales,
                paddle::optional<paddle::Tensor>& v_scales, int instructions) {
  const long N = k.shape()[0], K = k.shape()[1], Dh = k.shape()[2], room = k_cache.numel() / (K * Dh);
  const int64_t* at = slots.data<int64_t>();
  for (long i = 0; i < N; i++) PD_CHECK(at[i] >= 0 && at[i] < room, "slot ", at[i], " is not one of ", room);
  const float* from[2] = {k.data<float>(), v.data<float>()};
  const int which = instructions < 0 ? level() : std::min(instructions, level());
  for (int c = 0; c < 2; c++) {
    paddle::Tensor& cache = c ? v_cache : k_cache;
    float* scales = k_scales ? (c ? v_scales : k_scales)->data<float>() : nullptr;
    for (long i = 0; i < N; i++)
      write_slot(from[c] + i * K * Dh, K, Dh, at[i], cache.data(), scales, false, type_of(cache), which);
  }
}

PD_BUILD_OP(cpu_write_cache)
    .Inputs({"k", "v", "k_cache", "v_cache", "slots", paddle::Optional("k_scales"), paddle::Optional("v_scales")})
    .Outputs({"k_cache_out", "v_cache_out", paddle::Optional("k_scales_out"), paddle::Optional("v_scales_out")})
    .Attrs({"instructions: int"})
    .SetInplaceMap({{"k_cache", "k_cache_out"},
                    {"v_cache", "v_cache_out"},
                    {paddle::Optional("k_scales"), paddle::Optional("k_scales_out")},
                    {paddle::Optional("v_scales"), paddle::Optional("v_scales_out")}})
    .SetKernelFn(PD_KERNEL(WriteCache));
