// Packed integer weights: a few rows times them, and as floats; see quant.cc. Included once per instruction set after simd.h.

// y[m, c] for M rows and N vectors of columns: the codes of a group are summed first, then scaled once.
template <int M, int N>
static void quant_tile(const Packed& w, const float* x, const float* sums, long column, float* y) {
  const long per_word = 32 / w.bits, words = w.group / per_word;
  const vi mask = vi{} + ((1 << w.bits) - 1);
  vf total[M][N] = {};
  for (long g = 0; g < w.groups; g++) {
    vf acc[M][N] = {};
    for (long word = g * words; word < std::min((g + 1) * words, w.in / per_word); word++) {
      vi packed[N];
#pragma GCC unroll 4
      for (int n = 0; n < N; n++) std::memcpy(&packed[n], w.codes + word * w.out + column + n * VL, sizeof(vi));
      for (long j = 0; j < per_word; j++) {
        const float* row = x + word * per_word + j;
#pragma GCC unroll 4
        for (int n = 0; n < N; n++) {
          const vf code = __builtin_convertvector(packed[n] & mask, vf);
          packed[n] >>= w.bits;
#pragma GCC unroll 8
          for (int m = 0; m < M; m++) acc[m][n] += code * row[m * w.in];
        }
      }
    }
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) {
      const vf scale = load(w.scales + g * w.out + column + n * VL), zero = load(w.zeros + g * w.out + column + n * VL);
#pragma GCC unroll 8
      for (int m = 0; m < M; m++) total[m][n] += (acc[m][n] - zero * sums[m * w.groups + g]) * scale;
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < M; m++)
#pragma GCC unroll 4
    for (int n = 0; n < N; n++) store(y + m * w.out + column + n * VL, total[m][n]);
}

template <int M>
static void quant_rows(const Packed& w, const float* x, const float* sums, long from, long to, float* y) {
  constexpr int N = M > 4 ? 2 : 4;
  long c = from;
  for (; c + N * VL <= to; c += N * VL) quant_tile<M, N>(w, x, sums, c, y);
  for (; c + VL <= to; c += VL) quant_tile<M, 1>(w, x, sums, c, y);
}

// Columns [from, to), a multiple of VL, of all rows, eight at a time.
static void quant_columns(const Packed& w, const float* x, const float* sums, long rows, long from, long to, float* y) {
  for (long m = 0; m < rows; m += 8, x += 8 * w.in, sums += 8 * w.groups, y += 8 * w.out) switch (std::min(8L, rows - m)) {
      case 1: quant_rows<1>(w, x, sums, from, to, y); break;
      case 2: quant_rows<2>(w, x, sums, from, to, y); break;
      case 3: quant_rows<3>(w, x, sums, from, to, y); break;
      case 4: quant_rows<4>(w, x, sums, from, to, y); break;
      case 5: quant_rows<5>(w, x, sums, from, to, y); break;
      case 6: quant_rows<6>(w, x, sums, from, to, y); break;
      case 7: quant_rows<7>(w, x, sums, from, to, y); break;
      default: quant_rows<8>(w, x, sums, from, to, y);
    }
}

// The rows of one word row as floats, all columns: out (32 / bits, w.out).
static void unpack_word_row(const Packed& w, long word, float* out) {
  const long per_word = 32 / w.bits, g = word * per_word / w.group;
  const vi mask = vi{} + ((1 << w.bits) - 1);
  for (long c = 0; c < w.out; c += VL) {
    vi packed;
    std::memcpy(&packed, w.codes + word * w.out + c, sizeof(vi));
    const vf scale = load(w.scales + g * w.out + c), zero = load(w.zeros + g * w.out + c);
    for (long j = 0; j < per_word; j++, packed >>= w.bits) store(out + j * w.out + c, (__builtin_convertvector(packed & mask, vf) - zero) * scale);
  }
}
