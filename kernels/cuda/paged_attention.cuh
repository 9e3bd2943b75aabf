// Paged decode attention: one query per sequence over keys and values in blocks of a pool, the keys split over thread
// blocks.
//
// A thread block takes one sequence, one key/value head with up to 8 of its query heads (each key and value is read
// once for all of them), and one run of keys; a second kernel merges the runs (flash-decoding: Dao et al., 2023).
// Within a block, `lanes` threads hold 8 values each of one key, other threads hold other keys; online softmax in base
// 2. An int8 value is int8 * scale, with a scale per slot and key/value head: a key's scale multiplies its scores, a
// value's its weight. MORE: reads only the keys of the window, and applies softcap and ALiBi to complete scores; for
// at most 4 query heads, because 8 need too many registers.
#pragma once
#include <climits>

#include "common.cuh"

constexpr int DECODE_THREADS = 128, DECODE_WARPS = DECODE_THREADS / 32,
              IN_FLIGHT = 4;  // keys that a thread loads before it uses the first one
constexpr float LOG2E = 1.44269504088896340736f;

template <typename T, typename C, int G, bool MORE>
__global__ void paged_decode(const T* q, const C* k_cache, const C* v_cache, const float* k_scales,
                             const float* v_scales, const int* tables, const int* contexts, int H, int K, int Dh,
                             int block_size, int most_blocks, int split_keys, int lanes, float scale,
                             const float* slopes, int window, float cap, T* out, float* partial) {
  SHARED(float, shared);  // (warps, G, Dh + 2): weighted values, largest score, sum of weights
  const int group = H / K, tiles = (group + G - 1) / G;
  const int s = blockIdx.x, head = blockIdx.y / tiles, first = blockIdx.y % tiles * G, split = blockIdx.z;
  const int heads = group - first < G ? group - first : G;  // query heads of this block
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int d = threadIdx.x % lanes * 8, slot = threadIdx.x / lanes, slots = DECODE_THREADS / lanes;
  const int context = contexts[s], begin = (MORE && context > window ? context - window : 0) + split * split_keys;
  const int end = context < begin + split_keys ? context : begin + split_keys;
  const bool holds = d < Dh;

  float query[G][8], total[G][8], top[G], sum[G];
#pragma unroll
  for (int g = 0; g < G; g++) {
    top[g] = -FLT_MAX, sum[g] = 0.0f;
    Vec<T, 8> v;
    if (holds && g < heads) v = load<8>(q + ((long)s * H + head * group + first + g) * Dh + d);
#pragma unroll
    for (int i = 0; i < 8; i++)
      total[g][i] = 0.0f, query[g][i] = holds && g < heads ? to_float(v.at[i]) * (scale * LOG2E) : 0.0f;
  }

  for (int base = begin; base < end;
       base += slots * IN_FLIGHT) {  // the same for all threads, as the shuffles below need
    Vec<C, 8> keys[IN_FLIGHT], values[IN_FLIGHT];
    float k_scale[IN_FLIGHT], v_scale[IN_FLIGHT];
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; u++) {
      const int key = base + u * slots + slot;
      k_scale[u] = v_scale[u] = 1.0f;
      if (key >= end) continue;
      const long at =
          ((long)tables[(long)s * most_blocks + key / block_size] * block_size + key % block_size) * K + head;
      if (holds) keys[u] = load<8>(k_cache + at * Dh + d), values[u] = load<8>(v_cache + at * Dh + d);
      if (k_scales != nullptr) k_scale[u] = k_scales[at], v_scale[u] = v_scales[at];
    }
    float scores[IN_FLIGHT][G];
#pragma unroll
    for (int u = 0; u < IN_FLIGHT; u++) {
      const bool valid = base + u * slots + slot < end;
#pragma unroll
      for (int g = 0; g < G; g++) {
        float score = 0.0f;
        if (valid && holds) {
#pragma unroll
          for (int i = 0; i < 8; i++) score += query[g][i] * to_float(keys[u].at[i]);
        }
        for (int o = lanes >> 1; o > 0; o >>= 1) score += __shfl_xor_sync(WARP, score, o);
        score *= k_scale[u];
        if (MORE && cap > 0.0f) score = cap * LOG2E * tanhf(score / (cap * LOG2E));
        if (MORE && slopes != nullptr && g < heads)
          score -= slopes[head * group + first + g] * LOG2E * (float)(context - 1 - base - u * slots - slot);
        scores[u][g] = valid ? score : -FLT_MAX;
      }
    }
#pragma unroll
    for (int g = 0; g < G; g++) {
      float largest = top[g];
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; u++) largest = fmaxf(largest, scores[u][g]);
      const float shrink = exp2f(top[g] - largest);
      top[g] = largest, sum[g] *= shrink;
#pragma unroll
      for (int i = 0; i < 8; i++) total[g][i] *= shrink;
#pragma unroll
      for (int u = 0; u < IN_FLIGHT; u++) {
        if (base + u * slots + slot >= end) continue;
        const float p = exp2f(scores[u][g] - largest), weight = p * v_scale[u];
        sum[g] += p;
        if (!holds) continue;
#pragma unroll
        for (int i = 0; i < 8; i++) total[g][i] += weight * to_float(values[u].at[i]);
      }
    }
  }

#pragma unroll
  for (int g = 0; g < G; g++) {  // keys of one warp, then of all warps
    for (int o = lanes; o < 32; o <<= 1) {
      const float other = __shfl_xor_sync(WARP, top[g], o), largest = fmaxf(top[g], other);
      const float mine = exp2f(top[g] - largest), theirs = exp2f(other - largest);
      sum[g] = sum[g] * mine + __shfl_xor_sync(WARP, sum[g], o) * theirs;
#pragma unroll
      for (int i = 0; i < 8; i++) total[g][i] = total[g][i] * mine + __shfl_xor_sync(WARP, total[g][i], o) * theirs;
      top[g] = largest;
    }
    float* to = shared + (warp * G + g) * (Dh + 2);
    if (lane < lanes && holds)
#pragma unroll
      for (int i = 0; i < 8; i++) to[d + i] = total[g][i];
    if (lane == 0) to[Dh] = top[g], to[Dh + 1] = sum[g];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < heads * Dh; i += DECODE_THREADS) {
    const int g = i / Dh, at = i % Dh;
    float largest = -FLT_MAX, value = 0.0f, weights = 0.0f;
    for (int w = 0; w < DECODE_WARPS; w++) largest = fmaxf(largest, shared[(w * G + g) * (Dh + 2) + Dh]);
    for (int w = 0; w < DECODE_WARPS; w++) {
      const float* from = shared + (w * G + g) * (Dh + 2);
      const float weight = exp2f(from[Dh] - largest);
      value += from[at] * weight, weights += from[Dh + 1] * weight;
    }
    const long query_head = (long)s * H + head * group + first + g;
    if (gridDim.z == 1) {
      out[query_head * Dh + at] = from_float<T>(weights > 0.0f ? value / weights : 0.0f);
    } else {  // (S, H, splits, Dh + 2)
      float* to = partial + (query_head * gridDim.z + split) * (Dh + 2);
      to[at] = value;
      if (at == 0) to[Dh] = largest, to[Dh + 1] = weights;
    }
  }
}

// One block per query head: merges its runs of keys in order. A run past the sequence's end has no weight.
template <typename T>
__global__ void merge_splits(const float* partial, int splits, int Dh, T* out) {
  const float* from = partial + (long)blockIdx.x * splits * (Dh + 2);
  float largest = -FLT_MAX, weights = 0.0f;
  for (int i = 0; i < splits; i++) largest = fmaxf(largest, from[i * (Dh + 2) + Dh]);
  for (int i = 0; i < splits; i++) weights += from[i * (Dh + 2) + Dh + 1] * exp2f(from[i * (Dh + 2) + Dh] - largest);
  for (int d = threadIdx.x; d < Dh; d += blockDim.x) {
    float value = 0.0f;
    for (int i = 0; i < splits; i++) value += from[i * (Dh + 2) + d] * exp2f(from[i * (Dh + 2) + Dh] - largest);
    out[(long)blockIdx.x * Dh + d] = from_float<T>(weights > 0.0f ? value / weights : 0.0f);
  }
}

// ------------------------------------------------------------------------------------------------- launchers

static int heads_of_block(int group) { return group == 1 ? 1 : group <= 4 ? 4 : 8; }

// Number of runs of keys: enough blocks for a GPU of about a hundred multiprocessors, at least 128 keys each.
extern "C" int paged_attention_splits(int S, int H, int K, int longest) {
  const long blocks = (long)S * K * ceil_div(H / K, heads_of_block(H / K)), wanted = ceil_div(4 * 132, blocks),
             most = ceil_div(longest, 128);
  return (int)(wanted < most ? wanted : most < 1 ? 1 : most);
}

template <typename T, typename C>
static void paged_decode_launch(const void* q, const void* k_cache, const void* v_cache, const float* k_scales,
                                const float* v_scales, const int* tables, const int* contexts, int S, int H, int K,
                                int Dh, int block_size, int most_blocks, int longest, int splits, float scale,
                                const float* slopes, int window, float cap, void* out, float* partial,
                                cudaStream_t stream) {
  int lanes = 1;
  while (lanes * 8 < Dh) lanes *= 2;
  const bool more = slopes != nullptr || cap > 0.0f || window < INT_MAX;
  const int most = heads_of_block(H / K), G = more && most > 4 ? 4 : most, tiles = (int)ceil_div(H / K, G),
            split_keys = (int)ceil_div(longest, splits);
  auto* kernel = G == 1   ? (more ? paged_decode<T, C, 1, true> : paged_decode<T, C, 1, false>)
                 : G == 4 ? (more ? paged_decode<T, C, 4, true> : paged_decode<T, C, 4, false>)
                          : paged_decode<T, C, 8, false>;
  LAUNCH(kernel, dim3(S, K * tiles, splits), dim3(DECODE_THREADS), DECODE_WARPS * G * (Dh + 2) * sizeof(float), stream,
         (const T*)q, (const C*)k_cache, (const C*)v_cache, k_scales, v_scales, tables, contexts, H, K, Dh, block_size,
         most_blocks, split_keys, lanes, scale, slopes, window, cap, (T*)out, partial);
  if (splits == 1) return;
  auto* merge = merge_splits<T>;
  LAUNCH(merge, dim3(S * H), dim3(Dh <= 64 ? 64 : 128), 0, stream, partial, splits, Dh, (T*)out);
}

// q, out (S, H, Dh); caches (blocks, block_size, K, Dh) of q's dtype, or int8 with k_scales and v_scales (blocks,
// block_size, K); tables (S, most_blocks); contexts (S,): keys of each sequence, at most `longest`, of which the last
// `window` (INT_MAX: all) are visible; slopes (H,) or null; cap 0: none; partial: S * H * splits * (Dh + 2) floats if
// splits > 1. Dh is a multiple of 8 up to 256, all rows are 16-byte aligned.
extern "C" int launch_paged_attention(const void* q, const void* k_cache, const void* v_cache, const float* k_scales,
                                      const float* v_scales, const int* tables, const int* contexts, int S, int H,
                                      int K, int Dh, int block_size, int most_blocks, int longest, int splits,
                                      float scale, const float* slopes, int window, float cap, void* out,
                                      float* partial, int dtype, cudaStream_t stream) {
  const bool fits =
      Dh % 8 == 0 && Dh >= 8 && Dh <= 256 && H % K == 0 && S > 0 && splits > 0 && longest > 0 && window > 0;
  if (!fits || !aligned(q) || !aligned(k_cache) || !aligned(v_cache) || (k_scales == nullptr) != (v_scales == nullptr))
    return (int)cudaErrorInvalidValue;
  WITH_TYPE(dtype, {
    auto* launch = k_scales == nullptr ? paged_decode_launch<T, T> : paged_decode_launch<T, int8_t>;
    launch(q, k_cache, v_cache, k_scales, v_scales, tables, contexts, S, H, K, Dh, block_size, most_blocks, longest,
           splits, scale, slopes, window, cap, out, partial, stream);
  })
  return (int)cudaGetLastError();
}
