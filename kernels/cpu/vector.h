// A vector of L floats, and the few operations the kernels need on it.
//
// The kernels are written once over this header. GCC/clang vector extensions carry the arithmetic, with the width the
// target offers (16 lanes with AVX-512, 8 with AVX, else 4), so AVX2, SSE and NEON come for free. Intrinsics appear
// only where the extensions give bad code: transposes, joining short vectors, and bf16 dot products.
//
// Packed operands are arrays of 32-bit *units*. A unit is either one float (F32) or, with avx512_bf16, two bf16 numbers
// adjacent along the reduction (Bf16Pair): one dot-product instruction then does two multiply-adds a lane. Without that
// instruction bf16 is widened to float when it is packed. Everything accumulates in float.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define MST_INLINE inline __attribute__((always_inline))
#define MST_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define MST_UNROLL _Pragma("clang loop unroll(full)")
#define MST_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MST_UNROLL _Pragma("GCC unroll 64")
#define MST_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (v4i){i, j, k, l})
#endif

namespace mst {

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__)
#define MST_AVX512 1
constexpr int L = 16;
#elif defined(__AVX__)
constexpr int L = 8;
#else
constexpr int L = 4;
#endif

typedef float vf __attribute__((vector_size(4 * L)));
typedef float vf_mem __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef float v4f __attribute__((vector_size(16)));
typedef float v4f_mem __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t v4i __attribute__((vector_size(16)));

static MST_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
static MST_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }
static MST_INLINE vf broadcast(float x) { return x - vf{}; }
static MST_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

// ---- bf16 <-> float ------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

static MST_INLINE float to_float(float x) { return x; }
static MST_INLINE float to_float(bf16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}

// Round to nearest even; a NaN stays a (quiet) NaN.
static MST_INLINE void from_float(float x, float* out) { *out = x; }
static MST_INLINE void from_float(float x, bf16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40;
  out->bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

static MST_INLINE void convert(const float* src, float* dst, int n) { memcpy(dst, src, 4 * n); }
static MST_INLINE void convert(const float* src, bf16* dst, int n) {
  int i = 0;
#if defined(__AVX512BF16__) && defined(MST_AVX512)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(src + i)));
  for (; i + 4 <= n; i += 4)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(dst + i), (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(src + i)));
#endif
  for (; i < n; i++) from_float(src[i], dst + i);
}

// ---- units ---------------------------------------------------------------------------------------------------------

struct F32 {
  static constexpr int per_unit = 1;  // elements along the reduction in one unit
  static MST_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
};

#if defined(MST_AVX512) && defined(__AVX512BF16__)
#define MST_BF16_PAIRS 1
struct Bf16Pair {
  static constexpr int per_unit = 2;
  static MST_INLINE vf multiply_add(vf a, vf b, vf c) {
    return (vf)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
  }
};
#else
using Bf16Pair = F32;
#endif

// The unit that operands of element type E are packed to.
template <class E> struct UnitOf { using type = F32; };
template <> struct UnitOf<bf16> { using type = Bf16Pair; };

// ---- transposes ----------------------------------------------------------------------------------------------------

static MST_INLINE void transpose4(v4f& a, v4f& b, v4f& c, v4f& d) {
  const v4f ab_lo = MST_SHUFFLE4(a, b, 0, 4, 1, 5), ab_hi = MST_SHUFFLE4(a, b, 2, 6, 3, 7);
  const v4f cd_lo = MST_SHUFFLE4(c, d, 0, 4, 1, 5), cd_hi = MST_SHUFFLE4(c, d, 2, 6, 3, 7);
  a = MST_SHUFFLE4(ab_lo, cd_lo, 0, 1, 4, 5);
  b = MST_SHUFFLE4(ab_lo, cd_lo, 2, 3, 6, 7);
  c = MST_SHUFFLE4(ab_hi, cd_hi, 0, 1, 4, 5);
  d = MST_SHUFFLE4(ab_hi, cd_hi, 2, 3, 6, 7);
}

static MST_INLINE v4f load4(const float* p) { return *reinterpret_cast<const v4f_mem*>(p); }
static MST_INLINE void store4(float* p, v4f v) { *reinterpret_cast<v4f_mem*>(p) = v; }

// N floats, for N a power of two up to L; bf16 is widened four at a time.
template <int N> struct Floats {
  typedef float type __attribute__((vector_size(4 * N)));
  typedef float mem __attribute__((vector_size(4 * N), aligned(4), may_alias));
};
template <int N> static MST_INLINE typename Floats<N>::type load_n(const float* p) {
  return *reinterpret_cast<const typename Floats<N>::mem*>(p);
}
template <int N> static MST_INLINE void store_n(float* p, typename Floats<N>::type v) {
  *reinterpret_cast<typename Floats<N>::mem*>(p) = v;
}
static MST_INLINE v4f load4(const bf16* p) {
#if defined(__SSE4_1__)
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (v4f)_mm_slli_epi32(_mm_cvtepu16_epi32(narrow), 16);
#else
  return v4f{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
}
template <int N> static MST_INLINE v4f load_n(const bf16* p) {
  static_assert(N == 4);
  return load4(p);
}
static MST_INLINE void store4(bf16* p, v4f v) {
#if defined(MST_BF16_PAIRS)
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), (__m128i)_mm_cvtneps_pbh((__m128)v));
#else
  const v4i u = (v4i)v;
  const v4i rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16, quiet = (u >> 16) | 0x40;
  const v4i is_nan = (u & 0x7fffffff) > 0x7f800000;
  const v4i bits = (is_nan & quiet) | (~is_nan & rounded);
  for (int i = 0; i < 4; i++) p[i].bits = static_cast<uint16_t>(bits[i]);
#endif
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
    if constexpr (sizeof(E) * U::per_unit == 4)
      r[i] = _mm512_loadu_ps(rows[i]);
    else
      r[i] = _mm512_castsi512_ps(_mm512_slli_epi32(
          _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i]))), 16));
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
  if constexpr (NR == 8) {
    const __m512i lo = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11), hi = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
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
  if constexpr (sizeof(Y) == 2) return store_transposed_bf16<NR>(acc, y, ldy);
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
#elif defined(__AVX__)
  if constexpr (PARTS == 2)
    return (vf)_mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(from[0] + at)), _mm_loadu_ps(from[1] + at), 1);
#endif
}

}  // namespace mst
