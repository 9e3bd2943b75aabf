// All blocks of a decoder for one step of a server, in one call: kernels/fused.py describes the model and gives the
// tokens; products are those of panels.h, attention is that of paged_op.h.
//
//   x = embedding [+ position]
//   for each block, norm before:  x += O attention(QKV norm(x));  x += down(act(gate norm(x)) up norm(x))
//                   norm after:   x = norm(x + …)                 norm both: x += norm(… norm(x))
//   logits of the last token of each sequence = head norm(x)
//
// Queries, keys and values may come through narrow layers (MLA), the MLP may be experts (experts.h).
// The last block computes only those tokens behind its keys and values. C functions, called through ctypes: a call
// costs microseconds and other Python threads run meanwhile.
#include <array>
#include <climits>
#include <cmath>
#include <cstring>
#include <vector>

#include "experts.h"
#include "paged_op.h"
#include "panels.h"
#include "threads.h"

struct NormWeights {
  std::vector<float> weight, bias;  // weight empty: there is no such norm
  float epsilon = 0.0f;
  bool center = false;
};

#define BODY "transformer.h"
#include "every_isa.h"

namespace {
enum Place { BEFORE, AFTER, BOTH };
enum NormName {
  ATTENTION_NORM, MLP_NORM, ATTENTION_POST_NORM, MLP_POST_NORM, Q_NORM, K_NORM, Q_LATENT_NORM, KV_LATENT_NORM, NORMS
};
// UP: up, or gate and up in turn; of a sparse block, UP and DOWN are the shared expert. Of MLA, QKV gives the narrow
// queries (or all heads'), keys and values, and the common key; Q_UP and KV_UP make heads of them.
enum LinearName { QKV, OUTPUT, UP, DOWN, Q_UP, KV_UP, ROUTER, SHARED_GATE, LINEARS };
enum OuterName { HEAD, PROJECT_IN, PROJECT_OUT, OUTERS };  // PROJECT: between the embedding's width and D

struct LowRank {
  Panels down, up;  // (in, R) and (R, 64 · panels of the weight), float32; empty: none
};

struct Layer {
  Panels linears[LINEARS];
  std::vector<std::array<LowRank, LINEARS>> adapters;
  NormWeights norms[NORMS];
  Experts sparse;
  long window = INT_MAX;
  void *k = nullptr, *v = nullptr;  // (slots, K, Dh)
  float *k_scales = nullptr, *v_scales = nullptr;
  bool fixed_scales = false;
};

// As kernels/fused.py fills it, in this order.
struct Shape {
  int64_t layers, D, H, K, Dh, rotary, V, place, activation, gated, neighbours, cache, block_size, half_embedding;
  int64_t q_latent, kv_latent, nope, value;  // of MLA; kv_latent 0: none; q_latent 0: queries come in full
  int64_t instructions;
  double attention_scale, attention_softcap, final_softcap, embedding_scale, residual_scale;
};

struct Model {
  Shape s;
  std::vector<Layer> layers;
  NormWeights embedding_norm, final_norm;
  Panels outer[OUTERS];
  const void* embedding = nullptr;   // (V, width), kept by the caller; null: the columns of the head
  const float* positions = nullptr;  // (rows, D), or null
  std::vector<float> slopes;
  Room x, y, z, qkv, rotated, attended, inner, narrow, extra, latent, logits;
  InputRoom inputs;
  ExpertRoom experts;
  long width() const { return outer[HEAD].in; }  // of the embedding
};

struct Step {
  int64_t tokens, sequences, width, slices;
  const int64_t *ids, *rows, *slots, *first, *last;  // rows: of the learned positions; first, last: token of a sequence
  const int32_t *tables, *queries, *contexts;
  const float *cos, *sin, *q_scale;  // (tokens, rotary / 2) twice, (tokens,); each may be null
  const int64_t* slice;              // (slices, 5): adapter or -1, its first token and end, its first sequence and end
  float* logits;                     // (sequences, V)
};

template <class Task>
void rows_of(long n, const Task& task) {  // few rows: waking another thread would take longer
  if (n <= 8)
    for (long i = 0; i < n; i++) task(i);
  else parallel((n + 7) / 8, [&](long t) {
    for (long i = 8 * t; i < std::min(n, 8 * t + 8); i++) task(i);
  });
}

void normalize(const NormWeights& w, const float* x, long n, long D, float* y, int which) {
  rows_of(n, [&](long i) { PICK(which, norm_token)(w, x + i * D, D, y + i * D); });
}

void product(Model& m, const Panels& w, const float* x, long n, const Sink& sink, int which) {
  multiply_panels(w, prepare(w, x, n, m.inputs, which), sink, which);
}

// What the adapters add to the product of x (n, in) and a weight, as Sink wants it; null: nothing. The rows of x are
// the step's tokens, or its sequences if there are fewer.
const float* adapters_add(Model& m, const Layer& layer, LinearName name, const Step& step, const float* x, long n,
                          int which) {
  const Panels& w = layer.linears[name];
  const long width = 64 * w.panels();
  float* sums = nullptr;
  for (const int64_t* slice = step.slice; slice < step.slice + 5 * step.slices; slice += 5) {
    if (slice[0] < 0 || layer.adapters[slice[0]][name].down.out == 0) continue;
    const LowRank& lora = layer.adapters[slice[0]][name];
    if (!sums) sums = m.extra.get<float>(n * width), std::fill_n(sums, n * width, 0.0f);
    const long from = slice[n < step.tokens ? 3 : 1], rows = slice[n < step.tokens ? 4 : 2] - from, R = lora.down.out;
    float* narrow = m.narrow.get<float>(rows * R);
    product(m, lora.down, x + from * w.in, rows, {STORE, narrow, R}, which);
    product(m, lora.up, narrow, rows, {STORE, sums + from * width, width}, which);
  }
  return sums;
}

// Row `id` of the embedding that is the head's weight, of float32 or bfloat16.
void embed_from_head(const Panels& head, long id, float* to) {
  const long panel = id / 64, n = id % 64;
  if (head.storage == FLOAT)
    for (long k = 0; k < head.in; k++) to[k] = ((const float*)head.data.get())[(panel * head.in + k) * 64 + n];
  else
    for (long k = 0, words = half_panel_words(head.in); k < head.in; k++) {
      const uint32_t word = ((const uint32_t*)head.data.get())[(panel * words + k / 2) * 64 + n];
      const uint32_t bits = k % 2 ? word & 0xFFFF0000 : word << 16;
      std::memcpy(to + k, &bits, 4);
    }
}

void embed(Model& m, const Step& step, float* x, int which) {
  const long D = m.s.D, width = m.width();
  const Panels& in = m.outer[PROJECT_IN];
  float* table = in.out ? m.y.get<float>(step.tokens * width) : x;
  rows_of(step.tokens, [&](long i) {
    float* to = table + i * width;
    const long at = step.ids[i] * width;
    if (!m.embedding) embed_from_head(m.outer[HEAD], step.ids[i], to);
    else if (m.s.half_embedding)
      for (long d = 0; d < width; d++) {
        const uint32_t bits = (uint32_t)((const uint16_t*)m.embedding)[at + d] << 16;
        std::memcpy(to + d, &bits, 4);
      }
    else std::copy((const float*)m.embedding + at, (const float*)m.embedding + at + width, to);
    if (m.s.embedding_scale != 1.0)
      for (long d = 0; d < width; d++) to[d] *= (float)m.s.embedding_scale;
  });
  if (in.out) product(m, in, table, step.tokens, {STORE, x, D}, which);
  if (m.positions)
    rows_of(step.tokens, [&](long i) { PICK(which, add_row)(m.positions + step.rows[i] * D, D, x + i * D); });
  if (m.embedding_norm.weight.empty()) return;
  std::vector<float> copy(x, x + step.tokens * D);
  normalize(m.embedding_norm, copy.data(), step.tokens, D, x, which);
}

void write_both(const Model& m, const Layer& layer, const float* k, const float* v, long heads, long slot, int which) {
  const auto type = (CacheType)m.s.cache;
  write_slot(k, heads, m.s.Dh, slot, layer.k, layer.k_scales, layer.fixed_scales, type, which);
  write_slot(v, heads, m.s.Dh, slot, layer.v, layer.v_scales, layer.fixed_scales, type, which);
}

// Norms and rotation of the heads of every token: queries to q (tokens, H, Dh), keys and values into the cache.
void write_heads(Model& m, Layer& layer, const Step& step, const float* qkv, float* q, int which) {
  const long H = m.s.H, K = m.s.K, Dh = m.s.Dh, row = (H + 2 * K) * Dh;
  rows_of(step.tokens, [&](long i) {
    static thread_local std::vector<float> room;
    room.resize((H + 2 * K) * Dh + K * Dh);
    float *from = room.data(), *k = from + row;
    const float *of = qkv + i * row, *cos = step.cos ? step.cos + i * (m.s.rotary / 2) : nullptr,
                *sin = step.cos ? step.sin + i * (m.s.rotary / 2) : nullptr;
    if (!layer.norms[Q_NORM].weight.empty()) {
      for (long h = 0; h < H + K; h++)
        PICK(which, norm_token)(layer.norms[h < H ? Q_NORM : K_NORM], of + h * Dh, Dh, from + h * Dh);
      std::copy(of + (H + K) * Dh, of + row, from + (H + K) * Dh);
      of = from;
    }
    PICK(which, rotate_heads)(of, cos, sin, H, Dh, m.s.rotary, m.s.neighbours, q + i * H * Dh);
    PICK(which, rotate_heads)(of + H * Dh, cos, sin, K, Dh, m.s.rotary, m.s.neighbours, k);
    if (step.q_scale)
      for (long d = 0; d < H * Dh; d++) q[i * H * Dh + d] *= step.q_scale[i];
    write_both(m, layer, k, of + (H + K) * Dh, K, step.slots[i], which);
  });
}

// The same for MLA: q (tokens, H, Dh), kv (tokens, H, nope + value), and the common key, `row` floats apart.
void write_latent_heads(Model& m, Layer& layer, const Step& step, const float* from_q, long q_row, const float* kv,
                        const float* common, long row, float* q, int which) {
  const long H = m.s.H, Dh = m.s.Dh, nope = m.s.nope, value = m.s.value, R = m.s.rotary;
  rows_of(step.tokens, [&](long i) {
    static thread_local std::vector<float> room;
    room.resize(2 * H * Dh + R);
    float *k = room.data(), *v = k + H * Dh, *turned = v + H * Dh;
    const float *cos = step.cos ? step.cos + i * (R / 2) : nullptr, *sin = step.cos ? step.sin + i * (R / 2) : nullptr;
    PICK(which, rotate_heads)(common + i * row, cos, sin, 1, R, R, m.s.neighbours, turned);
    for (long h = 0; h < H; h++) {
      const float *of = from_q + i * q_row + h * Dh, *of_kv = kv + (i * H + h) * (nope + value);
      float* to = q + (i * H + h) * Dh;
      std::copy(of, of + nope, to);
      PICK(which, rotate_heads)(of + nope, cos, sin, 1, R, R, m.s.neighbours, to + nope);
      std::copy(of_kv, of_kv + nope, k + h * Dh);
      std::copy(turned, turned + R, k + h * Dh + nope);
      std::copy(of_kv + nope, of_kv + nope + value, v + h * Dh);
      std::fill(v + h * Dh + value, v + (h + 1) * Dh, 0.0f);  // values are kept as wide as keys
    }
    if (step.q_scale)
      for (long d = 0; d < H * Dh; d++) q[i * H * Dh + d] *= step.q_scale[i];
    write_both(m, layer, k, v, H, step.slots[i], which);
  });
}

void attention(Model& m, Layer& layer, const Step& step, const float* q, float* out, int which) {
  Paged a{};
  a.S = step.sequences, a.H = m.s.H, a.K = m.s.K, a.Dh = m.s.Dh, a.block_size = m.s.block_size, a.width = step.width;
  a.scale = (float)m.s.attention_scale, a.q = q, a.k = layer.k, a.v = layer.v;
  a.k_scales = layer.k_scales, a.v_scales = layer.v_scales;
  a.tables = step.tables, a.queries = step.queries, a.contexts = step.contexts, a.first = (const long*)step.first;
  a.out = out, a.slopes = m.slopes.empty() ? nullptr : m.slopes.data();
  a.window = layer.window, a.softcap = (float)m.s.attention_softcap;
  paged_attend(a, (CacheType)m.s.cache, which);
}

void gather(const int64_t* rows, long n, long width, const float* x, float* y) {
  for (long i = 0; i < n; i++) std::memmove(y + i * width, x + rows[i] * width, width * sizeof(float));  // rows ascend
}

// One step. n, x, y: rows that are still computed, their residual stream, and what the next product reads.
struct Pass {
  Model& m;
  const Step& step;
  const Shape& s;
  const int which;
  long n;
  float *x, *y, *z;

  Pass(Model& m, const Step& step)
      : m(m), step(step), s(m.s), which(level((int)s.instructions)), n(step.tokens) {
    const long width = std::max<long>(s.D, m.width());
    x = m.x.get<float>(n * width), y = m.y.get<float>(n * width), z = m.z.get<float>(n * width);
  }

  void linear(const Layer& layer, LinearName name, const float* of, Sink sink) {
    sink.extra = adapters_add(m, layer, name, step, of, n, which);
    product(m, layer.linears[name], of, n, sink, which);
  }
  // y = what the block's next product reads; x: what is added to its result.
  void begin(const NormWeights& norm) {
    if (s.place == AFTER) std::copy(x, x + n * s.D, y);
    else normalize(norm, x, n, s.D, y, which);
    if (s.residual_scale)
      rows_of(n, [&](long i) {
        for (long d = i * s.D; d < (i + 1) * s.D; d++) x[d] = y[d] * (float)s.residual_scale;
      });
  }
  void add(const float* of) {
    rows_of(n, [&](long i) { PICK(which, add_row)(of + i * s.D, s.D, x + i * s.D); });
  }
  // x becomes x + what a product gave, in z; norm: of it (BOTH), or of the sum (AFTER).
  void end(const NormWeights& norm) {
    if (s.place == BOTH) normalize(norm, z, n, s.D, y, which), add(y);
    else add(z), after(norm);
  }
  void after(const NormWeights& norm) {
    if (s.place == AFTER) normalize(norm, x, n, s.D, y, which), std::swap(x, y);
  }
  void residual(const Layer& layer, LinearName name, const float* of, const NormWeights& norm) {
    if (s.place == BOTH) linear(layer, name, of, {STORE, z, s.D}), end(norm);
    else linear(layer, name, of, {ADD, x, s.D}), after(norm);
  }

  // Queries of y to q; keys and values into the cache.
  void heads(Layer& layer, float* q) {
    const long wide = s.H * s.Dh, of_queries = s.q_latent ? s.q_latent : wide;
    const long row = s.kv_latent ? of_queries + s.kv_latent + s.rotary : wide + 2 * s.K * s.Dh;
    float* qkv = m.qkv.get<float>(n * row);
    linear(layer, QKV, y, {STORE, qkv, row});
    if (!s.kv_latent) return write_heads(m, layer, step, qkv, q, which);
    float* narrow = m.latent.get<float>(n * (s.q_latent + s.kv_latent + (s.q_latent ? wide : 0) +
                                             s.H * (s.nope + s.value)));
    float *narrow_kv = narrow + n * s.q_latent, *kv = narrow_kv + n * s.kv_latent,
          *full_q = kv + n * s.H * (s.nope + s.value);
    rows_of(n, [&](long i) {
      const float* of = qkv + i * row;
      if (s.q_latent)
        PICK(which, norm_token)(layer.norms[Q_LATENT_NORM], of, s.q_latent, narrow + i * s.q_latent);
      PICK(which, norm_token)(layer.norms[KV_LATENT_NORM], of + of_queries, s.kv_latent, narrow_kv + i * s.kv_latent);
    });
    if (s.q_latent) linear(layer, Q_UP, narrow, {STORE, full_q, wide});
    linear(layer, KV_UP, narrow_kv, {STORE, kv, s.H * (s.nope + s.value)});
    write_latent_heads(m, layer, step, s.q_latent ? full_q : qkv, s.q_latent ? wide : row, kv,
                       qkv + of_queries + s.kv_latent, row, q, which);
  }

  void attend(Layer& layer) {
    const bool before = s.place != AFTER;
    const long wide = s.H * s.Dh;
    begin(layer.norms[ATTENTION_NORM]);
    float *q = m.rotated.get<float>(n * wide), *attended = m.attended.get<float>(n * wide);
    heads(layer, q);
    attention(m, layer, step, q, attended, which);
    if (&layer == &m.layers.back() && step.sequences < n) {
      gather(step.last, step.sequences, wide, attended, attended);
      gather(step.last, step.sequences, s.D, x, x);
      n = step.sequences;
    }
    if (s.kv_latent)  // values were kept as wide as keys
      for (long i = 0; i < n * s.H; i++)
        std::memmove(attended + i * s.value, attended + i * s.Dh, s.value * sizeof(float));
    residual(layer, OUTPUT, attended, layer.norms[before ? ATTENTION_POST_NORM : ATTENTION_NORM]);
  }

  void feed_forward(Layer& layer) {
    const NormWeights& norm = layer.norms[s.place != AFTER ? MLP_POST_NORM : MLP_NORM];
    begin(layer.norms[MLP_NORM]);
    const long width = layer.linears[DOWN].in;
    Sink inner{s.gated ? GATE : ACTIVATE, m.inner.get<float>(n * width), width, (Activation)s.activation};
    const bool sparse = !layer.sparse.experts.empty(), shared = layer.linears[DOWN].out > 0;
    if (sparse) {
      float* logits = m.logits.get<float>(n * layer.linears[ROUTER].out);
      product(m, layer.linears[ROUTER], y, n, {STORE, logits, layer.linears[ROUTER].out}, which);
      run_experts(layer.sparse, logits, y, n, s.D, inner, z, m.experts, which);
    }
    if (shared) linear(layer, UP, y, inner);
    if (!sparse) return residual(layer, DOWN, inner.y, norm);
    if (shared && layer.linears[SHARED_GATE].out) {
      float* gates = m.logits.get<float>(n);
      product(m, layer.linears[SHARED_GATE], y, n, {STORE, gates, 1}, which);
      float* of_shared = m.latent.get<float>(n * s.D);
      linear(layer, DOWN, inner.y, {STORE, of_shared, s.D});
      for (long i = 0; i < n; i++)
        for (long d = i * s.D; d < (i + 1) * s.D; d++) z[d] += of_shared[d] / (1.0f + std::exp(-gates[i]));
    } else if (shared) linear(layer, DOWN, inner.y, {ADD, z, s.D});
    end(norm);
  }

  void run() {
    const Pool::Awake awake;
    embed(m, step, x, which);
    for (Layer& layer : m.layers) attend(layer), feed_forward(layer);
    if (!m.final_norm.weight.empty()) normalize(m.final_norm, x, n, s.D, y, which), std::swap(x, y);
    const Panels& out = m.outer[PROJECT_OUT];
    if (out.out) product(m, out, x, n, {STORE, y, out.out}, which), std::swap(x, y);
    product(m, m.outer[HEAD], x, n, {STORE, step.logits, s.V}, which);
    if (s.final_softcap)
      parallel(n, [&](long i) { PICK(which, cap_row)((float)s.final_softcap, s.V, step.logits + i * s.V); });
  }
};
}  // namespace

// --------------------------------------------------------------------------------- called by kernels/fused.py

extern "C" {
Model* fused_new(const Shape* shape) {
  start_model();
  Model* m = new Model();
  m->s = *shape;
  m->layers.resize(shape->layers);
  return m;
}
void fused_free(Model* m) { delete m; }

// layer -1: the norms of the embedding (0) and of the end (1).
void fused_norm(Model* m, long layer, long name, const float* weight, const float* bias, long n, double epsilon,
                long center) {
  NormWeights& w = layer < 0 ? (name ? m->final_norm : m->embedding_norm) : m->layers[layer].norms[name];
  w.weight.assign(weight, weight + n), w.epsilon = (float)epsilon, w.center = center;
  if (bias) w.bias.assign(bias, bias + n);
  else if (center) w.bias.assign(n, 0.0f);
}
// layer -1: an OuterName. Returns the bytes of the packed weight.
long fused_linear(Model* m, long layer, long name, const Source* from) {
  Panels& w = layer < 0 ? m->outer[name] : m->layers[layer].linears[name];
  w = pack(*from);
  return (long)w.bytes();
}
void fused_experts(Model* m, long layer, const Routing* routing) {
  Experts& to = m->layers[layer].sparse;
  to.routing = *routing, to.routing.correction = nullptr, to.experts.resize(routing->experts);
  if (routing->correction) to.correction.assign(routing->correction, routing->correction + routing->experts);
}
long fused_expert(Model* m, long layer, long expert, const Source* up, const Source* down) {
  Experts::Expert& to = m->layers[layer].sparse.experts[expert];
  to.up = pack(*up), to.down = pack(*down);
  return (long)(to.up.bytes() + to.down.bytes());
}
// A LoRA beside a weight; adapters are numbered from 0. Returns its bytes.
long fused_adapter(Model* m, long layer, long name, long adapter, const Source* down, const Source* up) {
  auto& adapters = m->layers[layer].adapters;
  for (Layer& each : m->layers)
    if ((long)each.adapters.size() <= adapter) each.adapters.resize(adapter + 1);
  LowRank& to = adapters[adapter][name];
  to.down = pack(*down), to.up = pack(*up);
  return (long)(to.down.bytes() + to.up.bytes());
}
// bytes: of k, of v. A step reads single rows all over them, each of which costs a page walk if pages are small.
void fused_layer(Model* m, long layer, long window, long bytes, long fixed_scales, void* k, void* v, float* k_scales,
                 float* v_scales) {
  Layer& to = m->layers[layer];
  use_huge_pages(k, bytes), use_huge_pages(v, bytes);
  to.window = window ? window : INT_MAX;
  to.k = k, to.v = v, to.k_scales = k_scales, to.v_scales = v_scales, to.fixed_scales = fixed_scales;
}
void fused_inputs(Model* m, const void* embedding, const float* positions, const float* slopes) {
  m->embedding = embedding, m->positions = positions;
  if (slopes) m->slopes.assign(slopes, slopes + m->s.H);
}
void fused_step(Model* m, const Step* step) { Pass(*m, *step).run(); }
}
