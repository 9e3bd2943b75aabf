// Packed integer weights: products with a few rows, and unpacking to floats; see quant.cc. Included once per
// instruction set after simd.h.

static INLINE vf codes_of(vi packed, vi mask) { return __builtin_convertvector(packed & mask, vf); }

// Zero points of columns [from, to), multiples of 32 / BITS, as floats: out (groups, to - from). Stored minus 1.
typedef int ints4 __attribute__((vector_size(16)));
typedef int ints8 __attribute__((vector_size(32)));
typedef float floats4 __attribute__((vector_size(16)));
typedef float floats8 __attribute__((vector_size(32)));
template <int BITS, class Ints, class Floats>
static void unpack_zeros_of(const Packed& w, long from, long to, float* out) {
  constexpr int PER_WORD = 32 / BITS, MASK = (1 << BITS) - 1;
  Ints shifts;
  for (int j = 0; j < PER_WORD; j++) shifts[j] = j * BITS;
  for (long g = 0; g < w.groups; g++)
    for (long c = from; c < to; c += PER_WORD, out += PER_WORD) {
      const Ints zeros = (((Ints{} + w.zeros[(g * w.out + c) / PER_WORD]) >> shifts) + 1) & MASK;
      const Floats found = __builtin_convertvector(zeros, Floats);
      std::memcpy(out, &found, sizeof(found));
    }
}
static std::vector<float> unpack_zeros(const Packed& w, long from, long to) {
  std::vector<float> zeros(w.groups * (to - from), (float)(1 << (w.bits - 1)));
  if (w.zeros && w.bits == 4) unpack_zeros_of<4, ints8, floats8>(w, from, to, zeros.data());
  if (w.zeros && w.bits == 8) unpack_zeros_of<8, ints4, floats4>(w, from, to, zeros.data());
  return zeros;
}

// Sum of each run of rows of x (in): out[run].
static void sum_runs(const Packed& w, const std::vector<Run>& runs, const float* x, float* out) {
  const long per_word = 32 / w.bits;
  for (const Run& run : runs) {
    vf sum = {};
    long i = run.from * per_word;
    for (; i + VL <= run.to * per_word; i += VL) sum += load(x + i);
    float rest = 0.0f;
    for (; i < run.to * per_word; i++) rest += x[i];
    *out++ = hsum(sum) + rest;
  }
}

// Shared by all tiles of a task; zeros (groups, width) start at column `first`.
struct Columns {
  const Packed& w;
  const std::vector<Run>& runs;  // none: a row's group is w.index[row]
  const float *x, *sums, *zeros, *bias;
  long first, width;
  float* y;
};

// y[m, c] for M rows and N vectors of columns: the codes of a run are summed, then scaled once.
template <int M, int N>
static void tile_of_runs(const Columns& t, long column) {
  const Packed& w = t.w;
  const long per_word = 32 / w.bits, n_runs = t.runs.size();
  const vi mask = vi{} + ((1 << w.bits) - 1);
  vf total[M][N] = {};
  for (long r = 0; r < n_runs; r++) {
    vf acc[M][N] = {};
    for (long word = t.runs[r].from; word < t.runs[r].to; word++) {
      vi packed[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const int* at = w.codes + word * w.out + column + n * VL;
        std::memcpy(&packed[n], at, sizeof(vi));
        __builtin_prefetch(at + 4 * w.out);  // the hardware prefetcher stops at a page's end
      }
      for (long j = 0; j < per_word; j++) {
        const float* row = t.x + word * per_word + j;
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const vf code = codes_of(packed[n], mask);
          packed[n] >>= w.bits;
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) acc[m][n] += code * row[m * w.in];
        }
      }
    }
    const long g = t.runs[r].group;
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const vf scale = load(w.scales + g * w.out + column + n * VL),
               zero = load(t.zeros + g * t.width + column - t.first + n * VL);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[m][n] += (acc[m][n] - zero * t.sums[m * n_runs + r]) * scale;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
      store(t.y + m * w.out + column + n * VL, t.bias ? total[m][n] + load(t.bias + column + n * VL) : total[m][n]);
}

// The same if neighboring rows have different groups (act order): every code is scaled.
template <int M, int N>
static void tile_of_rows(const Columns& t, long column) {
  const Packed& w = t.w;
  const long per_word = 32 / w.bits;
  const vi mask = vi{} + ((1 << w.bits) - 1);
  vf total[M][N] = {};
  for (long word = 0; word < w.in / per_word; word++) {
    vi packed[N];
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) std::memcpy(&packed[n], w.codes + word * w.out + column + n * VL, sizeof(vi));
    for (long j = 0; j < per_word; j++) {
      const long i = word * per_word + j, g = w.index[i];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) {
        const vf scale = load(w.scales + g * w.out + column + n * VL),
                 zero = load(t.zeros + g * t.width + column - t.first + n * VL);
        const vf weight = (codes_of(packed[n], mask) - zero) * scale;
        packed[n] >>= w.bits;
#pragma GCC unroll 8
        for (int m = 0; m < M; m++) total[m][n] += weight * t.x[m * w.in + i];
      }
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++)
      store(t.y + m * w.out + column + n * VL, t.bias ? total[m][n] + load(t.bias + column + n * VL) : total[m][n]);
}

template <int M>
static void some_rows(const Columns& t) {
  constexpr int N = M > 4 ? 2 : 4;
  const auto wide_tile = t.runs.empty() ? tile_of_rows<M, N> : tile_of_runs<M, N>,
             tile = t.runs.empty() ? tile_of_rows<M, 1> : tile_of_runs<M, 1>;
  const long to = t.first + t.width;
  long c = t.first;
  for (; c + N * VL <= to; c += N * VL) wide_tile(t, c);
  for (; c + VL <= to; c += VL) tile(t, c);
  if (c < to) tile(t, to - VL);  // the last vector overlaps earlier columns: the same sums again
}

// Columns [from, to), at least VL, of all rows, eight rows at a time.
static void quant_columns(const Packed& w, const std::vector<Run>& runs, const float* x, const float* sums,
                          const float* bias, long rows, long from, long to, float* y) {
  const std::vector<float> zeros = unpack_zeros(w, from, to);
  for (long m = 0; m < rows; m += 8) {
    const Columns t{w,    runs,      x + m * w.in, sums + m * (long)runs.size(), zeros.data(), bias,
                    from, to - from, y + m * w.out};
    switch (std::min(8L, rows - m)) {
      case 1:
        some_rows<1>(t);
        break;
      case 2:
        some_rows<2>(t);
        break;
      case 3:
        some_rows<3>(t);
        break;
      case 4:
        some_rows<4>(t);
        break;
      case 5:
        some_rows<5>(t);
        break;
      case 6:
        some_rows<6>(t);
        break;
      case 7:
        some_rows<7>(t);
        break;
      default:
        some_rows<8>(t);
    }
  }
}

// Columns [from, to), at least VL, as floats: out (in, out).
static void unpack_columns(const Packed& w, long from, long to, float* out) {
  const long per_word = 32 / w.bits, width = to - from;
  const vi mask = vi{} + ((1 << w.bits) - 1);
  const std::vector<float> zeros = unpack_zeros(w, from, to);
  for (long word = 0; word < w.in / per_word; word++) {
    long groups[8];
    for (long j = 0; j < per_word; j++) groups[j] = w.group_of(word * per_word + j);
    for (long at = from; at < to; at += VL) {
      const long c = std::min(at, to - VL);
      vi packed;
      std::memcpy(&packed, w.codes + word * w.out + c, sizeof(vi));
      for (long j = 0; j < per_word; j++, packed >>= w.bits)
        store(out + (word * per_word + j) * w.out + c,
              (codes_of(packed, mask) - load(zeros.data() + groups[j] * width + c - from)) *
                  load(w.scales + groups[j] * w.out + c));
    }
  }
}
