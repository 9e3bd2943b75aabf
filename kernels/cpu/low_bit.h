// Decoding for one instruction set; see low_bit.cc. Values equal the table's times the scale, rounded once.

static inline void put(float* y, float value) { *y = value; }
static inline void put(uint16_t* y, float value) {  // bfloat16, to nearest even
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  *y = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
#if VL == 16
static inline void put(float* y, __m512 values) { _mm512_storeu_ps(y, values); }
static inline void put(uint16_t* y, __m512 values) {
  const __m512i bits = _mm512_castps_si512(values);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i sum = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff)), odd);
  _mm256_storeu_si256((__m256i*)y, _mm512_cvtepi32_epi16(_mm512_srli_epi32(sum, 16)));
}
// The values of 16 codes from code k on.
static inline __m512 values_of(const Blocks& w, long k, __m512 table) {
  if (w.per_byte == 1) {
    const __m128i bytes = _mm_loadu_si128((const __m128i*)(w.codes + k));
    return _mm512_i32gather_ps(_mm512_cvtepu8_epi32(bytes), w.values, 4);
  }
  const __m128i bytes = _mm_loadl_epi64((const __m128i*)(w.codes + k / 2)), low = _mm_set1_epi8(15);
  const __m128i pairs = _mm_unpacklo_epi8(_mm_and_si128(_mm_srli_epi16(bytes, 4), low), _mm_and_si128(bytes, low));
  return _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(pairs), table);
}
#endif

// Weights [from, to) of the flat weight.
template <class T>
static void decode(const Blocks& w, long from, long to, T* y) {
#if VL == 16
  const __m512 table = _mm512_loadu_ps(w.values);
#endif
  for (long k = from; k < to;) {
    const long end = std::min(to, (k / w.size + 1) * w.size);
    const float scale = w.scales[k / w.size];
    if (w.per_byte == 2 && k % 2) put(y++, w.value(k) * scale), k++;
#if VL == 16
    for (; k + 16 <= end; k += 16, y += 16) put(y, _mm512_mul_ps(values_of(w, k, table), _mm512_set1_ps(scale)));
#endif
    for (; k < end; k++) put(y++, w.value(k) * scale);
  }
}

// x (rows, in), at most ROWS rows -> y, whose rows are `out` apart: their columns.
template <class T>
static void write_columns(const float* x, long rows, long in, T* y, long out) {
  long i = 0;
#if VL == 16
  const __m512i at = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
                                        _mm512_set1_epi32((int)in));
  for (; rows == 16 && i < in; i++) put(y + i * out, _mm512_i32gather_ps(at, x + i, 4));
#endif
  for (; i < in; i++)
    for (long r = 0; r < rows; r++) put(y + i * out + r, x[r * in + i]);
}

template <class T>
static void dequantize_to(const Blocks& w, long in, long out, bool transposed, T* y) {
  parallel((out + ROWS - 1) / ROWS, [&](long task) {
    const long first = task * ROWS, rows = std::min(ROWS, out - first);
    if (transposed) return decode(w, first * in, (first + rows) * in, y + first * in);
    static thread_local std::vector<float> buffer;
    buffer.resize(rows * in);
    decode(w, first * in, (first + rows) * in, buffer.data());
    write_columns(buffer.data(), rows, in, y + first, out);
  });
}
static void dequantize(const Blocks& w, long in, long out, bool transposed, bool half, void* y) {
  if (half) dequantize_to(w, in, out, transposed, (uint16_t*)y);
  else dequantize_to(w, in, out, transposed, (float*)y);
}
