// The cores of kernels/cuda on a machine with a GPU and nvcc alone: error, time, bytes, share of the copy bandwidth for
// each.
//
//     nvcc -O3 -std=c++17 -arch=sm_90 -I kernels/cuda tests/gpu/cuda_harness.cu -o harness && ./harness        # sm_80
//     for an A100
//     ./harness small          # shapes of a moment, to see that results are right
//
// Every core reads and writes each byte about once, so the floor of its time is bytes / bandwidth, with the bandwidth
// of a copy on the same GPU (both its reads and its writes counted); weights that fit the L2 cache can pass 100 %.
// Errors are the largest |found - expected| in units of the largest |expected|, against double on the host, on a sample
// of rows; the program ends with 1 if one is past its type's limit.
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <random>
#include <vector>

#include "cross_entropy.cuh"
#include "paged_attention.cuh"
#include "quant.cuh"
#include "rms_norm.cuh"

static bool failed = false, small_shapes = false;
static double bandwidth = 0;  // bytes a second, of a copy

static void must(int error, const char* what) {
  if (error == 0) return;
  std::printf("%s: CUDA error %d\n", what, error);
  std::exit(1);
}

template <typename T>
struct Device {  // an array on the GPU with its values on the host
  std::vector<T> host;
  T* at = nullptr;
  explicit Device(size_t n, const std::function<T(size_t)>& value = [](size_t) { return T{}; }) : host(n) {
    for (size_t i = 0; i < n; i++) host[i] = value(i);
    must((int)cudaMalloc((void**)&at, n * sizeof(T)), "cudaMalloc");
    up();
  }
  Device(const Device&) = delete;
  ~Device() { cudaFree(at); }
  void up() { must((int)cudaMemcpy(at, host.data(), host.size() * sizeof(T), cudaMemcpyHostToDevice), "to the GPU"); }
  void down() {
    must((int)cudaMemcpy(host.data(), at, host.size() * sizeof(T), cudaMemcpyDeviceToHost), "from the GPU");
  }
  size_t bytes() const { return host.size() * sizeof(T); }
};

static float normal() {
  static std::mt19937 generator(1);
  static std::normal_distribution<float> distribution;
  static std::vector<float> drawn;
  static size_t next = 0;
  if (drawn.empty())
    for (int i = 0; i < 1 << 16; i++) drawn.push_back(distribution(generator));
  return drawn[next =
                   (next * 5 + 12345) % drawn.size()];  // drawing a billion numbers would take longer than all the rest
}
template <typename T>
static T host_value(float x);
template <>
float host_value(float x) {
  return x;
}
template <>
__nv_bfloat16 host_value(float x) {
  return __float2bfloat16(x);
}
static double host_double(float x) { return x; }
static double host_double(__nv_bfloat16 x) { return __bfloat162float(x); }
template <typename T>
static std::function<T(size_t)> normals(float shift = 0.0f) {
  return [shift](size_t) { return host_value<T>(normal() + shift); };
}

static double seconds(const std::function<void()>& run) {
  const int warm = small_shapes ? 0 : 5, times = small_shapes ? 1 : 50;
  cudaEvent_t from, to;
  must((int)cudaEventCreate(&from), "event"), must((int)cudaEventCreate(&to), "event");
  for (int i = 0; i < warm; i++) run();
  must((int)cudaEventRecord(from, 0), "event");
  for (int i = 0; i < times; i++) run();
  must((int)cudaEventRecord(to, 0), "event"), must((int)cudaEventSynchronize(to), "kernels");
  float milliseconds = 0;
  must((int)cudaEventElapsedTime(&milliseconds, from, to), "event");
  return milliseconds / 1e3 / times;
}

struct Error {
  double largest = 0, scale = 1e-30;
  void add(double found, double expected) {
    const double error = std::fabs(found - expected);
    if (!(error <= largest)) largest = error;  // NaN stays
    scale = std::fmax(scale, std::fabs(expected));
  }
};

template <typename T>
static void report(const char* name, const char* shape, const Error& error, double time, double bytes) {
  const double relative = error.largest / error.scale, limit = sizeof(T) == 4 ? 2e-5 : 8e-3;
  const bool right = relative <= limit;
  failed |= !right;
  std::printf("%-24s %-40s %-9s error %.1e%s  %9.1f us  %8.1f MB  %7.1f GB/s  %5.1f %% of the floor\n", name, shape,
              sizeof(T) == 4 ? "float32" : "bfloat16", relative, right ? "" : " WRONG", time * 1e6, bytes / 1e6,
              bytes / time / 1e9, 100 * bytes / bandwidth / time);
}

template <typename T>
constexpr int dtype_of() {
  return sizeof(T) == 4 ? FLOAT32 : BFLOAT16;
}

// ------------------------------------------------------------------------------------------------------ cores

template <typename T>
static void cross_entropy(long rows, long V) {
  char shape[64];
  std::snprintf(shape, sizeof shape, "%ld rows of %ld words", rows, V);
  Device<T> logits(rows * V, normals<T>());
  Device<int64_t> labels(rows, [&](size_t i) { return (int64_t)(i * 7919 % V); }), best(rows);
  Device<float> lse(rows), target(rows), d(rows, [](size_t i) { return 1.0f + i % 3; });
  auto forward = [&] {
    must(launch_cross_entropy(logits.at, labels.at, rows, V, 0.0f, lse.at, target.at, best.at, dtype_of<T>(), 0),
         "cross_entropy");
  };
  forward();
  lse.down(), target.down();
  Error loss, gradient;
  std::vector<double> expected;
  const long step = rows > 8 ? rows / 8 : 1;
  for (long row = 0; row < rows; row += step) {
    double top = -1e300, sum = 0;
    for (long i = 0; i < V; i++) top = std::fmax(top, host_double(logits.host[row * V + i]));
    for (long i = 0; i < V; i++) sum += std::exp(host_double(logits.host[row * V + i]) - top);
    expected.push_back(top + std::log(sum));
    loss.add(lse.host[row] - target.host[row], expected.back() - host_double(logits.host[row * V + labels.host[row]]));
  }
  const std::vector<T> before = logits.host;
  auto backward = [&] {
    must(launch_softmax_gradient(logits.at, labels.at, lse.at, d.at, rows, V, 0.0f, dtype_of<T>(), 0),
         "softmax's gradient");
  };
  backward();
  logits.down();
  for (long row = 0; row < rows; row += step)
    for (long i = 0; i < V; i++)
      gradient.add(
          host_double(logits.host[row * V + i]),
          (std::exp(host_double(before[row * V + i]) - expected[row / step]) - (i == labels.host[row])) * d.host[row]);
  logits.host = before, logits.up();
  report<float>("cross_entropy", shape, loss, seconds(forward), logits.bytes());
  report<T>("softmax gradient", shape, gradient, seconds(backward), 2.0 * logits.bytes());
}

template <typename T>
static void rms_norm(long rows, long D) {
  char shape[64];
  std::snprintf(shape, sizeof shape, "%ld rows of %ld, residual", rows, D);
  Device<T> x(rows * D, normals<T>()), residual(rows * D, normals<T>()), w(D, normals<T>(1)), h(rows * D), y(rows * D),
      dy(rows * D, normals<T>()), dx(rows * D), dw(D);
  Device<float> r(rows), parts(rms_norm_parts(rows) * D);
  const float epsilon = 1e-5f;
  auto forward = [&] {
    must(launch_rms_norm(x.at, residual.at, w.at, rows, D, epsilon, h.at, y.at, r.at, dtype_of<T>(), 0), "rms_norm");
  };
  auto backward = [&] {
    must(launch_rms_norm_backward(h.at, w.at, r.at, dy.at, residual.at, rows, D, dx.at, dw.at, parts.at, dtype_of<T>(),
                                  0),
         "rms_norm backward");
  };
  forward(), backward();
  h.down(), y.down(), dx.down(), dw.down();
  Error out, gradient;
  std::vector<double> sums(D, 0.0);
  for (long row = 0; row < rows; row++) {
    double squares = 0, products = 0;
    for (long i = row * D; i < (row + 1) * D; i++)
      squares += host_double(h.host[i]) * host_double(h.host[i]),
          products += host_double(dy.host[i]) * host_double(w.host[i % D]) * host_double(h.host[i]);
    const double scale = 1 / std::sqrt(squares / D + epsilon);
    for (long i = row * D; i < (row + 1) * D; i++) {
      const double value = host_double(h.host[i]), g = host_double(dy.host[i]), weight = host_double(w.host[i % D]);
      sums[i % D] += g * value * scale;
      out.add(value, host_double(x.host[i]) + host_double(residual.host[i])),
          out.add(host_double(y.host[i]), value * scale * weight);
      gradient.add(host_double(dx.host[i]),
                   scale * (g * weight - value * scale * scale * products / D) + host_double(residual.host[i]));
    }
  }
  Error weights;
  for (long d = 0; d < D; d++) weights.add(host_double(dw.host[d]), sums[d]);
  gradient.largest = std::fmax(gradient.largest / gradient.scale, weights.largest / weights.scale), gradient.scale = 1;
  report<T>("rms_norm", shape, out, seconds(forward), 4.0 * x.bytes());
  report<T>("rms_norm backward", shape, gradient, seconds(backward), 4.0 * x.bytes());
}

template <typename T, typename C>
static void paged_attention(int S, int H, int K, int Dh, int context, int block_size) {
  char shape[64];
  std::snprintf(shape, sizeof shape, "%d x %d keys, %d/%d heads of %d%s", S, context, H, K, Dh,
                sizeof(C) == 1 ? ", int8" : "");
  const bool int8 = sizeof(C) == 1;
  const int most = (int)ceil_div(context, block_size), blocks = S * most;
  const size_t slots = (size_t)blocks * block_size * K;
  auto stored = [&](size_t i) {
    C value;
    if constexpr (sizeof(C) == 1) value = (C)(int)(i * 2654435761u >> 24);
    else value = host_value<C>(normal());
    return value;
  };
  Device<T> q((size_t)S * H * Dh, normals<T>()), out((size_t)S * H * Dh);
  Device<C> k(slots * Dh, stored), v(slots * Dh, [&](size_t i) { return stored(i + 12345); });
  Device<float> ks(slots, [](size_t i) { return 0.01f + 0.0001f * (i % 50); }),
      vs(slots, [](size_t i) { return 0.02f - 0.0001f * (i % 50); });
  Device<int> tables((size_t)S * most, [&](size_t i) { return blocks - 1 - (int)i; }),
      contexts(S, [&](size_t s) { return context - (int)(s % 3); });
  const int splits = paged_attention_splits(S, H, K, context);
  Device<float> partial((size_t)S * H * splits * (Dh + 2));
  const float scale = 1.0f / std::sqrt((float)Dh);
  auto run = [&] {
    must(launch_paged_attention(q.at, k.at, v.at, int8 ? ks.at : nullptr, int8 ? vs.at : nullptr, tables.at,
                                contexts.at, S, H, K, Dh, block_size, most, context, splits, scale, nullptr, INT_MAX,
                                0.0f, out.at, partial.at, dtype_of<T>(), 0),
         "paged attention");
  };
  run();
  out.down();
  Error error;
  auto cached = [&](const Device<C>& cache, const Device<float>& scales, size_t slot, int d) {
    if constexpr (sizeof(C) == 1) return (double)cache.host[slot * Dh + d] * scales.host[slot];
    else return host_double(cache.host[slot * Dh + d]);
  };
  for (int s = 0; s < S; s += S > 4 ? S / 4 : 1)
    for (int head = 0; head < H; head += H > 3 ? H / 3 : 1) {
      std::vector<double> scores(contexts.host[s]), sum(Dh, 0.0);
      std::vector<size_t> slot(contexts.host[s]);
      double top = -1e300, weights = 0;
      for (int j = 0; j < contexts.host[s]; j++) {
        slot[j] = ((size_t)tables.host[s * most + j / block_size] * block_size + j % block_size) * K + head / (H / K);
        for (int d = 0; d < Dh; d++)
          scores[j] += host_double(q.host[((size_t)s * H + head) * Dh + d]) * cached(k, ks, slot[j], d) * scale;
        top = std::fmax(top, scores[j]);
      }
      for (int j = 0; j < contexts.host[s]; j++) {
        const double p = std::exp(scores[j] - top);
        weights += p;
        for (int d = 0; d < Dh; d++) sum[d] += p * cached(v, vs, slot[j], d);
      }
      for (int d = 0; d < Dh; d++) error.add(host_double(out.host[((size_t)s * H + head) * Dh + d]), sum[d] / weights);
    }
  report<T>("paged attention", shape, error, seconds(run),
            2.0 * S * context * K * (Dh * sizeof(C) + (int8 ? 4.0 : 0.0)));
}

template <typename T>
static void quant_linear(int rows, long in, long out, int bits, int group) {
  char shape[64];
  std::snprintf(shape, sizeof shape, "%d x %ld x %ld, %d bits in %d", rows, in, out, bits, group);
  const int per = 32 / bits, mask = (1 << bits) - 1;
  Device<T> x(rows * in, normals<T>()), y(rows * out), weights(in * out);
  auto word = [](size_t i) { return (int)(i * 2654435761u ^ (i >> 7) * 40503u); };
  Device<int> codes(in / per * out, word), zeros(in / group * (out / per), word);
  Device<float> scales(in / group * out, [](size_t i) { return 0.01f + 0.0001f * (i % 100); }),
      partial(quant_linear_parts(in, bits) * rows * out);
  auto run = [&] {
    must(launch_quant_linear(x.at, codes.at, scales.at, zeros.at, nullptr, rows, in, out, bits, group, y.at, partial.at,
                             dtype_of<T>(), 0),
         "quant_linear");
  };
  auto unpack = [&] {
    must(launch_dequantize(codes.at, scales.at, zeros.at, in, out, bits, group, weights.at, dtype_of<T>(), 0),
         "dequantize");
  };
  run(), unpack();
  y.down(), weights.down();
  Error error, unpacked;
  for (long o = 0; o < out; o += out > 16 ? out / 16 - 1 : 1)
    for (int row = 0; row < rows; row++) {
      double sum = 0;
      for (long i = 0; i < in; i++) {
        const int code = (unsigned)codes.host[i / per * out + o] >> (i % per * bits) & mask,
                  zero = (((unsigned)zeros.host[(i / group * out + o) / per] >> (o % per * bits)) + 1) & mask;
        const double weight = (double)(code - zero) * scales.host[i / group * out + o];
        sum += host_double(x.host[row * in + i]) * weight;
        if (row == 0) unpacked.add(host_double(weights.host[i * out + o]), weight);
      }
      error.add(host_double(y.host[row * out + o]), sum);
    }
  report<T>("quant_linear", shape, error, seconds(run),
            codes.bytes() + zeros.bytes() + scales.bytes() + x.bytes() + y.bytes());
  if (rows == 1)
    report<T>("dequantize", shape, unpacked, seconds(unpack),
              codes.bytes() + zeros.bytes() + scales.bytes() + weights.bytes());
}

template <typename T>
static void every_core() {
  if (small_shapes) {
    cross_entropy<T>(5, 1000), rms_norm<T>(7, 264), paged_attention<T, T>(3, 4, 2, 64, 40, 16),
        paged_attention<T, int8_t>(2, 4, 2, 64, 150, 16);
    quant_linear<T>(1, 256, 136, 4, 128), quant_linear<T>(3, 128, 40, 8, 32);
    return;
  }
  cross_entropy<T>(2048, 128256), rms_norm<T>(8192, 4096), rms_norm<T>(32768, 768);
  paged_attention<T, T>(64, 32, 8, 128, 4096, 16), paged_attention<T, int8_t>(64, 32, 8, 128, 4096, 16),
      paged_attention<T, T>(1, 32, 8, 128, 65536, 16);
  for (int rows : {1, 4, 16}) quant_linear<T>(rows, 4096, 14336, 4, 128);
  quant_linear<T>(1, 8192, 28672, 4, 128), quant_linear<T>(1, 4096, 14336, 8, 128);
}

int main(int count, char** words) {
  small_shapes = count > 1 && !std::strcmp(words[1], "small");
  const size_t n = small_shapes ? 1 << 16 : (size_t)1 << 30;
  {
    Device<char> from(n), to(n);
    bandwidth =
        2.0 * n / seconds([&] { must((int)cudaMemcpyAsync(to.at, from.at, n, cudaMemcpyDeviceToDevice, 0), "copy"); });
  }
  std::printf("a copy: %.0f GB/s\n", bandwidth / 1e9);
  every_core<__nv_bfloat16>();
  every_core<float>();
  std::puts(failed ? "WRONG" : "all right");
  return failed;
}
