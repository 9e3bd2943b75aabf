// Products y = x W whose weight was packed once, in the layout that the instructions want; see panels.cc.
//
// W (in, out) becomes panels of 64 columns, one after another, so that a product of few rows reads memory in order:
//   FLOAT      panel[k][64]               float32, every instruction set (panels.cc)
//   BFLOAT16   panel[k / 2][64]           words of two rows; vdpbf16ps, or AMX tiles (panels_bf16.cc)
//   INT8       panel[k / 4][64]           words of four codes; vpdpbusd, or AMX tiles (panels_int.cc)
//   INT4       panel[k / 8][64]           words of eight codes: rows 0 … 3 in the low halves of its bytes, 4 … 7 above
// For INT8 and INT4, x is rounded to int8 by blocks of `block` input rows (the whole row: scheme a8w8), sums within a
// block are exact, and
//   y[m, n] = sum over blocks b of x_scale[m, b] w_scale[b's group, n] (sum_k x[m, k] code[k, n] - zero sum_k x[m, k]).
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <vector>

struct FreeMemory {
  std::shared_ptr<char> chunk;  // that the memory is a part of, or null
  void operator()(void* p) const {
    if (!chunk) std::free(p);
  }
};
using Buffer = std::unique_ptr<char, FreeMemory>;
Buffer huge_buffer(size_t bytes);    // in huge pages where the system has them
Buffer weight_buffer(size_t bytes);  // the same for what stays: weights of a model share pages
void start_model();                  // what is packed next shares no pages with what came before
void use_huge_pages(void* memory, size_t bytes);  // for memory that others allocated

enum Storage { FLOAT, BFLOAT16, INT8, INT4 };

struct Panels {
  Storage storage = FLOAT;
  long in = 0, out = 0;
  long block = 0, group = 0;  // INT8, INT4: input rows that share a scale of x, of W
  Buffer data;
  std::vector<float> scales;  // (panels, groups, 64): in the order in which a product of few rows reads them
  std::vector<float> zeros;   // the same; empty: `zero` everywhere
  int zero = 0;
  std::vector<float> bias;    // (64 · panels); empty: none
  std::vector<int> order;     // input k is x[order[k]]; empty: x[k]
  float input_scale = 0.0f;   // of all of x; 0: max |x| / 127 of each block
  long panels() const { return (out + 63) / 64; }
  long groups() const { return group ? (in + group - 1) / group : 1; }
  long blocks() const { return block ? (in + block - 1) / block : 1; }
  long at(long panel, long group) const { return (panel * groups() + group) * 64; }  // of scales, zeros
  size_t bytes() const;  // of the packed weight
};

// What a caller gives: float32 (in, out), or codes (in, out) as unsigned bytes with `zero` 128 or 8.
struct Source {
  Storage storage;
  long in, out, group;
  bool transposed;  // float32 data is (out, in)
  bool whole_rows;  // x is rounded by whole rows
  const void* data;
  const float *scales, *zeros, *bias;  // (groups, out), (groups, out) or null, (out) or null
  const int* order;                    // (in) or null
  float input_scale;
};
Panels pack(const Source& from);

// Memory that is kept from one product to the next.
struct Room {
  Buffer memory;
  size_t size = 0;
  template <class T>
  T* get(size_t n) {
    if (n * sizeof(T) > size) size = (n * sizeof(T) * 5 / 4 + 63) / 64 * 64, memory = huge_buffer(size);
    return (T*)memory.get();
  }
};

// x (rows, in) as a product wants it.
struct Inputs {
  long rows = 0, stride = 0;        // floats or words of a row
  const float* x = nullptr;         // FLOAT
  const uint32_t* words = nullptr;  // pairs of bfloat16, or four codes
  const float* scales = nullptr;    // (rows, blocks) of x
  const int* sums = nullptr;        // (rows, blocks) of the codes of x
};
struct InputRoom {
  Room words, scales, sums;
};
Inputs prepare(const Panels& w, const float* x, long rows, InputRoom& room, int which);

// What becomes of the sums: y (rows, out) = them + bias, added to y, or through an activation. GATE: panels alternate,
// 64 columns of the gate, 64 of up; y (rows, out / 2) = act(gate) up, the first `width` columns.
enum SinkKind { STORE, ADD, ACTIVATE, GATE };
enum Activation { ACT_SILU, ACT_GELU_TANH, ACT_GELU, ACT_RELU };
struct Sink {
  SinkKind kind;
  float* y;
  long width;  // of y
  Activation activation = ACT_SILU;
  const float* extra = nullptr;  // (rows, 64 · panels), added to the sums; null: nothing
};
void multiply_panels(const Panels& w, const Inputs& x, const Sink& sink, int which);

// Of each storage: packing, rounding of x, and sums c (m1 - m0, 64) of one panel; called by the functions above.
void pack_bfloat16(const Source& from, Panels& w);
long half_panel_words(long in);  // words of a column: pairs of input rows, the last ones padded
Inputs prepare_bfloat16(const Panels& w, const float* x, long rows, InputRoom& room);
void sums_bfloat16(const Panels& w, const Inputs& x, long m0, long m1, long panel, float* c, long ldc);
void pack_codes(const Source& from, Panels& w);
Inputs prepare_codes(const Panels& w, const float* x, long rows, InputRoom& room);
void sums_codes(const Panels& w, const Inputs& x, long m0, long m1, long panel, float* c, long ldc);
