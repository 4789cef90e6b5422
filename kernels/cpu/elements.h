// The element types of tensors: all that the kernels ask of one. They compute in float.
//
//     to_float, from_float   one number; from_float rounds to nearest even, and a NaN stays a (quiet) NaN
//     load4, store4          four numbers as a vector of floats
//     load16                 sixteen, with AVX-512 alone
//     widen                  N numbers as a vector of N floats
//     round_to               a vector of floats, rounded to the type
//     convert                n floats to numbers
//     UnitOf                 what packed operands consist of
//
// A new type needs the first two; the others are written out of them where they are not given.
//
// Packed operands are arrays of 32-bit *units*. A unit is either one float (F32) or, with avx512_bf16, two bf16 numbers
// adjacent along the reduction (Bf16Pair): one dot-product instruction then does two multiply-adds a lane. Without that
// instruction bf16 is widened to float when it is packed. Everything accumulates in float.
#pragma once
#include <type_traits>

#include "vector.h"

namespace mst {

// ---- float ---------------------------------------------------------------------------------------------------------

static MST_INLINE float to_float(float x) { return x; }
static MST_INLINE void from_float(float x, float* out) { *out = x; }
static MST_INLINE void convert(const float* src, float* dst, int n) { memcpy(dst, src, 4 * n); }
template <int N> static MST_INLINE typename Floats<N>::type widen(const float* p) { return load_n<N>(p); }

// ---- bf16 ----------------------------------------------------------------------------------------------------------

struct bf16 {
  uint16_t bits;
};

static MST_INLINE float to_float(bf16 x) {
  uint32_t wide = static_cast<uint32_t>(x.bits) << 16;
  float f;
  memcpy(&f, &wide, 4);
  return f;
}

static MST_INLINE void from_float(float x, bf16* out) {
  uint32_t u;
  memcpy(&u, &x, 4);
  const uint32_t rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
  const uint32_t quiet = (u >> 16) | 0x40;
  out->bits = static_cast<uint16_t>((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded);
}

static MST_INLINE v4f load4(const bf16* p) {
#if defined(__SSE4_1__)
  const __m128i narrow = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p));
  return (v4f)_mm_slli_epi32(_mm_cvtepu16_epi32(narrow), 16);
#else
  return v4f{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
#endif
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
static MST_INLINE __m512 load16(const bf16* p) {
  const __m512i narrow = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  return _mm512_castsi512_ps(_mm512_slli_epi32(narrow, 16));
}
#endif

static MST_INLINE void convert(const float* src, bf16* dst, int n) {
  int i = 0;
#if defined(MST_BF16_PAIRS)
  for (; i + 16 <= n; i += 16)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst + i), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(src + i)));
  for (; i + 4 <= n; i += 4)
    _mm_storel_epi64(reinterpret_cast<__m128i*>(dst + i), (__m128i)_mm_cvtneps_pbh(_mm_loadu_ps(src + i)));
#endif
  for (; i < n; i++) from_float(src[i], dst + i);
}

template <int N> static MST_INLINE typename Floats<N>::type widen(const bf16* p) {
  typename Ints<N>::half narrow;
  memcpy(&narrow, p, sizeof narrow);
  return (typename Floats<N>::type)(__builtin_convertvector(narrow, typename Ints<N>::type) << 16);
}

// ---- any other -----------------------------------------------------------------------------------------------------

template <class E> static MST_INLINE v4f load4(const E* p) {
  return v4f{to_float(p[0]), to_float(p[1]), to_float(p[2]), to_float(p[3])};
}
template <class E> static MST_INLINE void store4(E* p, v4f v) {
  for (int i = 0; i < 4; i++) from_float(v[i], p + i);
}
template <class E> static MST_INLINE void convert(const float* src, E* dst, int n) {
  for (int i = 0; i < n; i++) from_float(src[i], dst + i);
}
template <int N, class E> static MST_INLINE typename Floats<N>::type widen(const E* p) {
  float wide[N];
  for (int i = 0; i < N; i++) wide[i] = to_float(p[i]);
  return load_n<N>(wide);
}
template <class E, int N> static MST_INLINE typename Floats<N>::type round_to(typename Floats<N>::type v) {
  if constexpr (std::is_same_v<E, bf16>) {
    typedef typename Ints<N>::type ints;
    const ints u = (ints)v, rounded = u + 0x7fff + ((u >> 16) & 1), is_nan = (u & 0x7fffffff) > 0x7f800000;
    return (typename Floats<N>::type)(((is_nan & (u | 0x400000)) | (~is_nan & rounded)) & ~0xffff);
  }
  float wide[N];
  store_n<N>(wide, v);
  for (int i = 0; i < N; i++) {
    E narrow;
    from_float(wide[i], &narrow);
    wide[i] = to_float(narrow);
  }
  return load_n<N>(wide);
}
#if defined(MST_AVX512)
template <class E> static MST_INLINE __m512 load16(const E* p) {
  float wide[16];
  for (int i = 0; i < 16; i++) wide[i] = to_float(p[i]);
  return _mm512_loadu_ps(wide);
}
#endif

// How many of W numbers are worth loading at once: narrow ones are widened four at a time.
template <class E, int W> constexpr int numbers_at_once = std::is_same_v<E, float> ? W : 4;
template <int N, class E> static MST_INLINE v4f load_n(const E* p) {
  static_assert(N == 4);
  return load4(p);
}

// ---- units ---------------------------------------------------------------------------------------------------------

struct F32 {
  using element = float;
  static constexpr int per_unit = 1;  // elements along the reduction in one unit
  static MST_INLINE vf multiply_add(vf a, vf b, vf c) { return a * b + c; }
};

#if defined(MST_BF16_PAIRS)
struct Bf16Pair {
  using element = bf16;
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

}  // namespace mst
