// Packed weights in float32, and what all storages share: tasks, biases, activations; see panels.h.
//
// A task is up to 96 rows by a few panels; its sums stay in the second-level cache until they are finished. One thread
// computes each sum in a fixed order, so the number of threads does not change a bit.
#include <sys/mman.h>

#include <cmath>
#include <cstring>
#include <mutex>

#include "panels.h"
#include "threads.h"

#define BODY "panels_float.h"
#include "every_isa.h"

constexpr long HEIGHT = 96, MOST = 8;  // rows, and panels, of a task

Buffer huge_buffer(size_t bytes) {
  constexpr size_t PAGE = 1 << 21;
  const bool large = bytes >= 2 * PAGE;
  const size_t unit = large ? PAGE : 64, size = (std::max<size_t>(bytes, 1) + unit - 1) / unit * unit;
  void* p = std::aligned_alloc(unit, size);
  if (!p) throw std::bad_alloc();
  if (large) madvise(p, size, MADV_HUGEPAGE);
  return Buffer((char*)p);
}

static std::mutex mutex;
static std::weak_ptr<char> current;  // freed with the last weight in it
static size_t used = 0;
void start_model() {
  const std::lock_guard<std::mutex> lock(mutex);
  current.reset();
}
// Products of a few rows read all weights once, and would miss the translation of every small page.
Buffer weight_buffer(size_t bytes) {
  constexpr size_t CHUNK = 32 << 20;
  bytes = (bytes + 63) / 64 * 64;
  if (bytes > CHUNK / 2) return huge_buffer(bytes);
  const std::lock_guard<std::mutex> lock(mutex);
  std::shared_ptr<char> chunk = current.lock();
  if (!chunk || used + bytes > CHUNK) {
    chunk = std::shared_ptr<char>(huge_buffer(CHUNK).release(), [](void* p) { std::free(p); });
    current = chunk, used = 0;
  }
  char* at = chunk.get() + used;
  used += bytes;
  return Buffer(at, FreeMemory{chunk});
}

void use_huge_pages(void* memory, size_t bytes) {
  constexpr uintptr_t PAGE = 1 << 21;
  constexpr int COLLAPSE = 25;  // MADV_COLLAPSE, Linux 6.1: now, not when the kernel finds time
  const uintptr_t from = ((uintptr_t)memory + PAGE - 1) / PAGE * PAGE, to = ((uintptr_t)memory + bytes) / PAGE * PAGE;
  if (from >= to || madvise((void*)from, to - from, MADV_HUGEPAGE)) return;
  madvise((void*)from, to - from, COLLAPSE);  // an error leaves the pages as they are
}

size_t Panels::bytes() const {
  const size_t rows = storage == FLOAT ? 4 * in : storage == BFLOAT16 ? 2 * in : storage == INT8 ? in : in / 2;
  return panels() * 64 * rows + 4 * (scales.size() + zeros.size());
}

static void pack_float(const Source& from, Panels& w) {
  w.data = weight_buffer(w.panels() * 64 * w.in * sizeof(float));
  const float* x = (const float*)from.data;
  parallel(w.panels(), [&](long p) {
    float* to = (float*)w.data.get() + p * w.in * 64;
    const long width = std::min(64L, w.out - p * 64);
    for (long k = 0; k < w.in; k++, to += 64)
      for (long n = 0; n < 64; n++)
        to[n] = n >= width ? 0.0f : from.transposed ? x[(p * 64 + n) * w.in + k] : x[k * w.out + p * 64 + n];
  });
}

Panels pack(const Source& from) {
  Panels w;
  w.storage = from.storage, w.in = from.in, w.out = from.out;
  const long padded = 64 * w.panels();
  if (from.bias) w.bias.assign(from.bias, from.bias + w.out), w.bias.resize(padded);
  if (from.order) w.order.assign(from.order, from.order + w.in);
  if (w.storage == FLOAT) pack_float(from, w);
  else if (w.storage == BFLOAT16) pack_bfloat16(from, w);
  else {
    w.group = from.group, w.input_scale = from.input_scale;
    w.block = from.whole_rows ? w.in : 128;
    while (w.group < w.in && w.group % w.block) w.block /= 2;
    const auto padded_rows = [&](const float* rows, std::vector<float>& to) {
      to.resize(w.groups() * padded);
      for (long c = 0; c < w.out; c++)
        for (long g = 0; g < w.groups(); g++) to[w.at(c / 64, g) + c % 64] = rows[g * w.out + c];
    };
    padded_rows(from.scales, w.scales);
    if (from.zeros) padded_rows(from.zeros, w.zeros);
    pack_codes(from, w);
  }
  return w;
}

Inputs prepare(const Panels& w, const float* x, long rows, InputRoom& room, int which) {
  if (w.storage == BFLOAT16) return prepare_bfloat16(w, x, rows, room);
  if (w.storage != FLOAT) return prepare_codes(w, x, rows, room);
  Inputs in;
  in.rows = rows, in.stride = w.in, in.x = x;
  return in;
}

void multiply_panels(const Panels& w, const Inputs& x, const Sink& sink, int which) {
  const long panels = w.panels(), down = (x.rows + HEIGHT - 1) / HEIGHT, unit = sink.kind == GATE ? 2 : 1;
  const long share = panels * down / (8 * threads()) / unit * unit, most = std::max(unit, std::min(MOST, share));
  const long across = (panels + most - 1) / most;
  const auto task = [&](long t) {
    static thread_local Room room;
    // Tasks that follow each other share their panels, which then stay in the second-level cache.
    const long m0 = t % down * HEIGHT, m1 = std::min(x.rows, m0 + HEIGHT), first = t / down * most,
               last = std::min(panels, first + most), ldc = 64 * (last - first) + 16;  // not a power of two
    float* c = room.get<float>(HEIGHT * (MOST * 64 + 16));
    for (long p = first; p < last; p++) {
      float* to = c + 64 * (p - first);
      if (w.storage == BFLOAT16) sums_bfloat16(w, x, m0, m1, p, to, ldc);
      else if (w.storage != FLOAT) sums_codes(w, x, m0, m1, p, to, ldc);
      else PICK(which, sums_float)(w, x, m0, m1, p, to, ldc);
    }
    PICK(which, finish)(w, sink, m0, m1, first, last, c, ldc);
  };
  if (x.rows * w.in * w.out < (1 << 16))
    for (long t = 0; t < down * across; t++) task(t);
  else parallel(down * across, task);
}
