// Rows to columns and short strips to vectors, in registers.
#pragma once
#include "elements.h"

namespace mst {

// ---- transposes ----------------------------------------------------------------------------------------------------

static MST_INLINE void transpose4(v4f& a, v4f& b, v4f& c, v4f& d) {
  const v4f ab_lo = MST_SHUFFLE4(a, b, 0, 4, 1, 5), ab_hi = MST_SHUFFLE4(a, b, 2, 6, 3, 7);
  const v4f cd_lo = MST_SHUFFLE4(c, d, 0, 4, 1, 5), cd_hi = MST_SHUFFLE4(c, d, 2, 6, 3, 7);
  a = MST_SHUFFLE4(ab_lo, cd_lo, 0, 1, 4, 5);
  b = MST_SHUFFLE4(ab_lo, cd_lo, 2, 3, 6, 7);
  c = MST_SHUFFLE4(ab_hi, cd_hi, 0, 1, 4, 5);
  d = MST_SHUFFLE4(ab_hi, cd_hi, 2, 3, 6, 7);
}

#if defined(MST_AVX512)
// Rows r[0..15] to columns, in registers.
static MST_INLINE void transpose16(__m512 (&r)[16]) {
  __m512 t[16];
  MST_UNROLL for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_ps(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_ps(r[2 * i], r[2 * i + 1]);
  }
  MST_UNROLL for (int i = 0; i < 4; i++) {
    MST_UNROLL for (int h = 0; h < 2; h++) {
      const __m512d a = _mm512_castps_pd(t[4 * i + h]), b = _mm512_castps_pd(t[4 * i + 2 + h]);
      r[4 * i + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(a, b));
      r[4 * i + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(a, b));
    }
  }
  MST_UNROLL for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_f32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_f32x4(r[i + 8], r[i + 12], 0xdd);
  }
  MST_UNROLL for (int i = 0; i < 8; i++) {
    r[i] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_f32x4(t[i], t[i + 8], 0xdd);
  }
}
#endif

// dst[k * stride + i] = unit k of row i, for L rows and L units. `rows` points at the first unit of each row.
template <class U, class E>
static MST_INLINE void transpose_units(const E* const* rows, float* dst, int64_t stride) {
#if defined(MST_AVX512)
  __m512 r[16];
  MST_UNROLL for (int i = 0; i < 16; i++) {
    if constexpr (std::is_same_v<typename U::element, E>)
      r[i] = _mm512_loadu_ps(rows[i]);
    else
      r[i] = load16(rows[i]);
  }
  transpose16(r);
  MST_UNROLL for (int i = 0; i < 16; i++) _mm512_storeu_ps(dst + i * stride, r[i]);
#else
  for (int i = 0; i < L; i += 4)
    for (int k = 0; k < L; k += 4) {
      v4f a = load4(rows[i] + k), b = load4(rows[i + 1] + k), c = load4(rows[i + 2] + k), d = load4(rows[i + 3] + k);
      transpose4(a, b, c, d);
      store4(dst + k * stride + i, a);
      store4(dst + (k + 1) * stride + i, b);
      store4(dst + (k + 2) * stride + i, c);
      store4(dst + (k + 3) * stride + i, d);
    }
#endif
}

#if defined(MST_BF16_PAIRS)
// As store_transposed below, rounding first: half the shuffles.
template <int NR> static MST_INLINE void store_transposed_bf16(const vf (&acc)[NR], bf16* y, int64_t ldy) {
  alignas(64) static constexpr uint16_t order[2][32] = {  // four outputs of tokens 0-7 and 8-15 out of two row pairs
      {0, 16, 32, 48, 1, 17, 33, 49, 2, 18, 34, 50, 3, 19, 35, 51,
       4, 20, 36, 52, 5, 21, 37, 53, 6, 22, 38, 54, 7, 23, 39, 55},
      {8, 24, 40, 56, 9, 25, 41, 57, 10, 26, 42, 58, 11, 27, 43, 59,
       12, 28, 44, 60, 13, 29, 45, 61, 14, 30, 46, 62, 15, 31, 47, 63}};
  __m512i four[NR / 4][2];  // [h][half]: outputs 4h..4h+3 of 8 tokens, 8 bytes each
  MST_UNROLL for (int h = 0; h < NR / 4; h++) {
    const __m512i ab = (__m512i)_mm512_cvtne2ps_pbh((__m512)acc[4 * h + 1], (__m512)acc[4 * h]);
    const __m512i cd = (__m512i)_mm512_cvtne2ps_pbh((__m512)acc[4 * h + 3], (__m512)acc[4 * h + 2]);
    MST_UNROLL for (int half = 0; half < 2; half++)
      four[h][half] = _mm512_permutex2var_epi16(ab, _mm512_load_si512(order[half]), cd);
  }
  const __m512i lo = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), hi = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  if constexpr (NR == 16) {
    const __m512i first = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11), last = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    MST_UNROLL for (int q = 0; q < 4; q++) {  // of four tokens: outputs 0-7, 8-15
      const __m512i a = _mm512_permutex2var_epi64(four[0][q / 2], q % 2 ? hi : lo, four[1][q / 2]);
      const __m512i b = _mm512_permutex2var_epi64(four[2][q / 2], q % 2 ? hi : lo, four[3][q / 2]);
      MST_UNROLL for (int h = 0; h < 2; h++) {
        const __m512i two = _mm512_permutex2var_epi64(a, h ? last : first, b);
        bf16* p = y + (4 * q + 2 * h) * ldy;
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_castsi512_si256(two));
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + ldy), _mm512_extracti64x4_epi64(two, 1));
      }
    }
  } else if constexpr (NR == 8) {
    MST_UNROLL for (int q = 0; q < 4; q++) {
      const __m512i tokens = _mm512_permutex2var_epi64(four[0][q / 2], q % 2 ? hi : lo, four[1][q / 2]);
      bf16* p = y + 4 * q * ldy;
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_castsi512_si128(tokens));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + ldy), _mm512_extracti32x4_epi32(tokens, 1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 2 * ldy), _mm512_extracti32x4_epi32(tokens, 2));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 3 * ldy), _mm512_extracti32x4_epi32(tokens, 3));
    }
  } else {
    MST_UNROLL for (int half = 0; half < 2; half++) {
      alignas(64) int64_t eight[8];
      _mm512_store_si512(eight, four[0][half]);
      MST_UNROLL for (int t = 0; t < 8; t++) memcpy(static_cast<void*>(y + (8 * half + t) * ldy), eight + t, 8);
    }
  }
}
#endif

// y[t * ldy + r] = acc[r][t] for NR outputs and L tokens: the transposing store at the end of a tile.
template <int NR, class Y> static MST_INLINE void store_transposed(const vf (&acc)[NR], Y* y, int64_t ldy) {
#if defined(MST_BF16_PAIRS)
  if constexpr (std::is_same_v<Y, bf16>) return store_transposed_bf16<NR>(acc, y, ldy);
#endif
#if defined(MST_AVX512)
  __m512 q[NR];  // lane l of q[4 * (r / 4) + t]: outputs r..r+3 of token 4 * l + t
  MST_UNROLL for (int h = 0; h < NR; h += 4) {
    const __m512 a = (__m512)acc[h], b = (__m512)acc[h + 1], c = (__m512)acc[h + 2], d = (__m512)acc[h + 3];
    const __m512d ab_lo = _mm512_castps_pd(_mm512_unpacklo_ps(a, b));
    const __m512d cd_lo = _mm512_castps_pd(_mm512_unpacklo_ps(c, d));
    const __m512d ab_hi = _mm512_castps_pd(_mm512_unpackhi_ps(a, b));
    const __m512d cd_hi = _mm512_castps_pd(_mm512_unpackhi_ps(c, d));
    q[h] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_lo, cd_lo));
    q[h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_lo, cd_lo));
    q[h + 2] = _mm512_castpd_ps(_mm512_unpacklo_pd(ab_hi, cd_hi));
    q[h + 3] = _mm512_castpd_ps(_mm512_unpackhi_pd(ab_hi, cd_hi));
  }
  if constexpr (NR == 8) {
    const __m512i even = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11);
    const __m512i odd = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
    MST_UNROLL for (int t = 0; t < 4; t++) MST_UNROLL for (int h = 0; h < 2; h++) {
      const __m512d two = _mm512_permutex2var_pd(_mm512_castps_pd(q[t]), h ? odd : even, _mm512_castps_pd(q[t + 4]));
      Y* p = y + (8 * h + t) * ldy;  // tokens 8h + t and 8h + t + 4
      if constexpr (sizeof(Y) == 4) {
        _mm256_storeu_pd(reinterpret_cast<double*>(p), _mm512_castpd512_pd256(two));
        _mm256_storeu_pd(reinterpret_cast<double*>(p + 4 * ldy), _mm512_extractf64x4_pd(two, 1));
      } else {
        float wide[16];
        _mm512_storeu_pd(wide, two);
        store4(p, load4(wide));
        store4(p + 4, load4(wide + 4));
        store4(p + 4 * ldy, load4(wide + 8));
        store4(p + 4 * ldy + 4, load4(wide + 12));
      }
    }
  } else {
    MST_UNROLL for (int t = 0; t < 4; t++) {
      store4(y + t * ldy, (v4f)_mm512_castps512_ps128(q[t]));
      store4(y + (t + 4) * ldy, (v4f)_mm512_extractf32x4_ps(q[t], 1));
      store4(y + (t + 8) * ldy, (v4f)_mm512_extractf32x4_ps(q[t], 2));
      store4(y + (t + 12) * ldy, (v4f)_mm512_extractf32x4_ps(q[t], 3));
    }
  }
#else
  float wide[NR][L];
  for (int r = 0; r < NR; r++) store(wide[r], acc[r]);
  for (int h = 0; h < NR; h += 4)
    for (int t = 0; t < L; t += 4) {
      v4f a = load4(&wide[h][t]), b = load4(&wide[h + 1][t]), c = load4(&wide[h + 2][t]), d = load4(&wide[h + 3][t]);
      transpose4(a, b, c, d);
      store4(y + t * ldy + h, a);
      store4(y + (t + 1) * ldy + h, b);
      store4(y + (t + 2) * ldy + h, c);
      store4(y + (t + 3) * ldy + h, d);
    }
#endif
}

// ---- joining short strips into one vector --------------------------------------------------------------------------

// The concatenation of L / PARTS floats from each of PARTS places.
template <int PARTS> static MST_INLINE vf join(const float* const* from, int64_t at) {
  if constexpr (PARTS == 1) return load(from[0] + at);
#if defined(MST_AVX512)
  if constexpr (PARTS == 2)
    return (vf)_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(from[0] + at)),
                                  _mm256_loadu_ps(from[1] + at), 1);
  if constexpr (PARTS == 4) {
    __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(from[0] + at));
    v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(from[1] + at));
    v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(from[2] + at));
    return (vf)_mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(from[3] + at));
  }
#elif MST_LANES == 8 && defined(__AVX__)
  if constexpr (PARTS == 2)
    return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from[0] + at)), _mm_loadu_ps(from[1] + at), 1);
#endif
}

// The i-th of PARTS equal pieces of v.
template <int PARTS, int I> static MST_INLINE typename Floats<L / PARTS>::type piece(vf v) {
#if defined(MST_AVX512)
  if constexpr (PARTS == 2 && I == 0) return (typename Floats<8>::type)_mm512_castps512_ps256((__m512)v);
  if constexpr (PARTS == 2 && I == 1) return (typename Floats<8>::type)_mm512_extractf32x8_ps((__m512)v, 1);
  if constexpr (PARTS == 4) return (v4f)_mm512_extractf32x4_ps((__m512)v, I);
#elif MST_LANES == 8 && defined(__AVX__)
  if constexpr (PARTS == 2) return (v4f)_mm256_extractf128_ps((__m256)v, I);
#else
  static_assert(PARTS == 1);
  return v;
#endif
}

// ---- adding up the lanes of several vectors ------------------------------------------------------------------------

// In each group of four lanes: the sums of a's, b's, c's and d's lanes in that group.
static MST_INLINE vf sum_lanes4(vf a, vf b, vf c, vf d) {
#if defined(MST_AVX512)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps((__m512)a, (__m512)b), _mm512_unpackhi_ps((__m512)a, (__m512)b));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps((__m512)c, (__m512)d), _mm512_unpackhi_ps((__m512)c, (__m512)d));
  return (vf)_mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
#elif MST_LANES == 8 && defined(__AVX__)
  return (vf)_mm256_hadd_ps(_mm256_hadd_ps((__m256)a, (__m256)b), _mm256_hadd_ps((__m256)c, (__m256)d));
#else
  float lanes[4][L], sums[L];
  store(lanes[0], a), store(lanes[1], b), store(lanes[2], c), store(lanes[3], d);
  for (int i = 0; i < L; i += 4) {
    v4f e = load4(lanes[0] + i), f = load4(lanes[1] + i), g = load4(lanes[2] + i), h = load4(lanes[3] + i);
    transpose4(e, f, g, h);
    store4(sums + i, (e + f) + (g + h));
  }
  return load(sums);
#endif
}

// Lanes 4 i to 4 i + 3: the sums of the groups of four[i]; with sum_lanes4, each lane is the sum of one vector's lanes.
static MST_INLINE vf sum_groups(const vf (&four)[L / 4]) {
#if defined(MST_AVX512)
  const __m512 a = (__m512)four[0], b = (__m512)four[1], c = (__m512)four[2], d = (__m512)four[3];
  const __m512 ab = _mm512_add_ps(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  const __m512 cd = _mm512_add_ps(_mm512_shuffle_f32x4(c, d, 0x88), _mm512_shuffle_f32x4(c, d, 0xdd));
  return (vf)_mm512_add_ps(_mm512_shuffle_f32x4(ab, cd, 0x88), _mm512_shuffle_f32x4(ab, cd, 0xdd));
#elif MST_LANES == 8 && defined(__AVX__)
  const __m256 a = (__m256)four[0], b = (__m256)four[1];
  return (vf)_mm256_add_ps(_mm256_permute2f128_ps(a, b, 0x20), _mm256_permute2f128_ps(a, b, 0x31));
#else
  if constexpr (L == 4) return four[0];
  float sums[L];
  for (int i = 0; i < L / 4; i++) {
    float lanes[L];
    store(lanes, four[i]);
    v4f sum = load4(lanes);
    for (int k = 4; k < L; k += 4) sum += load4(lanes + k);
    store4(sums + 4 * i, sum);
  }
  return load(sums);
#endif
}

}  // namespace mst
