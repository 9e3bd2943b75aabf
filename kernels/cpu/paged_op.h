// Attention over a paged cache, and writing one token into it, for paged.cc's operators and for transformer.cc.
#pragma once
#include <algorithm>
#include <cstdint>

enum CacheType { CACHE_FLOAT, CACHE_BFLOAT16, CACHE_INT8 };

struct Paged {
  long S, H, K, Dh, block_size, width;  // width: blocks per row of the tables
  float scale;
  const float* q;
  const void *k, *v;                 // (slots, K, Dh), float, bfloat16 or int8
  const float *k_scales, *v_scales;  // (slots, K) of int8, or null
  const int *tables, *queries, *contexts;
  const long* first;  // row of q of each sequence's first query
  float* out;
  const float* slopes;  // (H,) of ALiBi, or null
  long window;          // a query at p sees keys > p - window; INT_MAX: no window
  float softcap;        // 0 means none
  long seen_from(long s, long query) const { return std::max(0L, contexts[s] - queries[s] + query + 1 - window); }
  long slot(long s, long j) const { return (long)tables[s * width + j / block_size] * block_size + j % block_size; }
};

// `which`: instructions, see every_isa.h.
void paged_attend(const Paged& a, CacheType type, int which);

// The K heads of one token, x (K, Dh), to a slot of a cache; scales (slots, K) only for int8.
// fixed: int8 codes are written for the scales that are there; else the scales are written too.
void write_slot(const float* x, long K, long Dh, long slot, void* cache, float* scales, bool fixed, CacheType type,
                int which);
