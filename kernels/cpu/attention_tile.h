// The inner loops of attention on packed float operands: small products, the exponential, masks, row-wise products.
#pragma once
#include <cmath>
#include <type_traits>

#include "common.h"

namespace mst {
namespace {

typedef int32_t vi __attribute__((vector_size(4 * L)));

constexpr float infinity = __builtin_inff();

MST_INLINE vf select(vi mask, vf yes, vf no) { return (vf)((mask & (vi)yes) | (~mask & (vi)no)); }
MST_INLINE vf larger(vf a, vf b) { return select((vi)(a > b), a, b); }

// The largest and the sum of the lanes.
MST_INLINE float lanes_max(vf v) {
#if defined(MST_AVX512)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float lane[L];
  store(lane, v);
  float best = lane[0];
  for (int i = 1; i < L; i++) best = lane[i] > best ? lane[i] : best;
  return best;
#endif
}
MST_INLINE v4f quarter_sum(vf v) {
#if defined(MST_AVX512)
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256((__m512)v), _mm512_extractf32x8_ps((__m512)v, 1));
  return (v4f)_mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
#else
  float lane[L];
  store(lane, v);
  v4f sum = load4(lane);
  for (int i = 4; i < L; i += 4) sum += load4(lane + i);
  return sum;
#endif
}
MST_INLINE float lanes_sum(vf v) {
  const v4f q = quarter_sum(v);
  return (q[0] + q[1]) + (q[2] + q[3]);
}

// e^x for x <= 88, relative error about 1e-7; 0 below the smallest normal number, NaN of NaN. The exponent's integer is
// rounded off by adding 1.5 * 2^23, whose low mantissa bits then hold it; the polynomial is that of Cephes' expf.
MST_INLINE vf exponential(vf x) {
  const vf magic = broadcast(12582912.0f);
  const vf t = x * 1.44269504f + magic, n = t - magic;
  const vf r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vf y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + (r + 1.0f);
  const vf power = (vf)(((vi)t + 127) << 23);
  return (vf)((vi)(y * power) & ~(vi)(x < -87.3f));
}

// ---- products ------------------------------------------------------------------------------------------------------

#if defined(MST_AVX512)
constexpr int MR = 8, NV = 2;  // 16 accumulators; 16 multiply-adds for 2 loads and 8 broadcasts
#else
constexpr int MR = 4, NV = 2;
#endif

// R rows by V vectors of c += a . b, or c = factor a . b. Entry (m, k) of a, a unit, is a[m * lda + k], or
// a[k * lda + m] if TRANSPOSED.
template <class U, int R, int V, bool TRANSPOSED>
MST_INLINE void product_block(const float* a, int64_t lda, const float* b, int64_t ldb, float* c, int64_t ldc,
                              int64_t depth, bool add, float factor) {
  vf acc[R][V];
  MST_UNROLL for (int r = 0; r < R; r++) MST_UNROLL for (int v = 0; v < V; v++)
    acc[r][v] = add ? load(c + r * ldc + v * L) : vf{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++) {
    vf y[V];
    MST_UNROLL for (int v = 0; v < V; v++) y[v] = load(b + k * ldb + v * L);
    MST_UNROLL for (int r = 0; r < R; r++) {
      const vf x = broadcast(TRANSPOSED ? a[k * lda + r] : a[r * lda + k]);
      MST_UNROLL for (int v = 0; v < V; v++) acc[r][v] = U::multiply_add(x, y[v], acc[r][v]);
    }
  }
  MST_UNROLL for (int r = 0; r < R; r++) MST_UNROLL for (int v = 0; v < V; v++)
    store(c + r * ldc + v * L, add ? acc[r][v] : acc[r][v] * factor);
}

// c[rows, vectors * L] += a . b over `depth` units, or c = factor a . b; rows is a multiple of MR.
template <class U, bool TRANSPOSED>
MST_NOINLINE void product(int64_t rows, int64_t vectors, int64_t depth, const float* a, int64_t lda, const float* b,
                          int64_t ldb, float* c, int64_t ldc, bool add, float factor = 1) {
  const int64_t row_step = TRANSPOSED ? 1 : lda;
  const auto block = [&](auto width, int64_t r, int64_t v) {
    product_block<U, MR, decltype(width)::value, TRANSPOSED>(a + r * row_step, lda, b + v * L, ldb, c + r * ldc + v * L,
                                                             ldc, depth, add, factor);
  };
  int64_t v = 0;
  for (; v + NV <= vectors; v += NV)
    for (int64_t r = 0; r < rows; r += MR) block(std::integral_constant<int, NV>(), r, v);
  for (; v < vectors; v++)
    for (int64_t r = 0; r < rows; r += MR) block(std::integral_constant<int, 1>(), r, v);
}

// ---- rows against rows at a constant distance ----------------------------------------------------------------------

constexpr int RV = L == 16 ? 4 : 2;  // vectors of a row held in registers

// Calls body(std::integral_constant<int, V>, offset) for pieces of V <= RV vectors of a row.
template <class Body> MST_INLINE void by_pieces(int64_t width, Body body) {
  int64_t at = 0;
  for (; at + RV * L <= width; at += RV * L) body(std::integral_constant<int, RV>(), at);
  if constexpr (RV > 3)
    if (at + 3 * L <= width) body(std::integral_constant<int, 3>(), at), at += 3 * L;
  if constexpr (RV > 2)
    if (at + 2 * L <= width) body(std::integral_constant<int, 2>(), at), at += 2 * L;
  if (at < width) body(std::integral_constant<int, 1>(), at);
}

// L numbers of a packed row.
MST_INLINE vf load_numbers(const float* p) { return load(p); }
#if defined(MST_AVX512)
MST_INLINE vf load_numbers(const bf16* p) { return (vf)load16(p); }
#endif

// out[n] = factor q . rows[n * step], n < count; writes up to a multiple of four.
template <class N>
MST_NOINLINE void row_dots(const float* q, const N* rows, int64_t step, int64_t count, int64_t width, float factor,
                           float* out) {
  by_pieces(width, [&](auto pieces, int64_t at) {
    constexpr int V = decltype(pieces)::value;
    vf x[V];
    MST_UNROLL for (int v = 0; v < V; v++) x[v] = load(q + at + v * L);
    for (int64_t n = 0; n < count; n += 4) {
      v4f sum[4];
      MST_UNROLL for (int i = 0; i < 4; i++) {
        const N* row = rows + std::min(n + i, count - 1) * step + at;
        vf acc = x[0] * load_numbers(row);
        MST_UNROLL for (int v = 1; v < V; v++) acc = x[v] * load_numbers(row + v * L) + acc;
        sum[i] = quarter_sum(acc);
      }
      transpose4(sum[0], sum[1], sum[2], sum[3]);
      const v4f four = ((sum[0] + sum[1]) + (sum[2] + sum[3])) * factor;
      store4(out + n, at ? load4(out + n) + four : four);
    }
  });
}

// out += sum of factor[n] * rows[n * step].
template <class N>
MST_NOINLINE void row_sums(const float* factor, const N* rows, int64_t step, int64_t count, int64_t width, float* out) {
  by_pieces(width, [&](auto pieces, int64_t at) {
    constexpr int V = decltype(pieces)::value;
    vf acc[V];
    MST_UNROLL for (int v = 0; v < V; v++) acc[v] = load(out + at + v * L);
    for (int64_t n = 0; n < count; n++) {
      const vf f = broadcast(factor[n]);
      const N* row = rows + n * step + at;
      MST_UNROLL for (int v = 0; v < V; v++) acc[v] = f * load_numbers(row + v * L) + acc[v];
    }
    MST_UNROLL for (int v = 0; v < V; v++) store(out + at + v * L, acc[v]);
  });
}

// rows[n * step] += factor[n] * x.
MST_NOINLINE void row_updates(const float* factor, const float* x, float* rows, int64_t step, int64_t count,
                              int64_t width) {
  by_pieces(width, [&](auto pieces, int64_t at) {
    constexpr int V = decltype(pieces)::value;
    vf y[V];
    MST_UNROLL for (int v = 0; v < V; v++) y[v] = load(x + at + v * L);
    for (int64_t n = 0; n < count; n++) {
      const vf f = broadcast(factor[n]);
      float* row = rows + n * step + at;
      MST_UNROLL for (int v = 0; v < V; v++) store(row + v * L, f * y[v] + load(row + v * L));
    }
  });
}

// ---- masks ---------------------------------------------------------------------------------------------------------

// s[j] = -inf outside [begin, end), and plus bias[j] if there is one.
MST_INLINE void mask_row(float* s, int width, int64_t begin, int64_t end, const float* bias) {
  vi lane;
  for (int i = 0; i < L; i++) lane[i] = i;
  const int32_t lo = static_cast<int32_t>(std::clamp<int64_t>(begin, 0, width));
  const int32_t hi = static_cast<int32_t>(std::clamp<int64_t>(end, 0, width));
  for (int j = 0; j < width; j += L) {
    vf x = load(s + j);
    if (bias) x = x + load(bias + j);
    const vi at = lane + j;
    store(s + j, select((vi)(at >= lo) & (vi)(at < hi), x, broadcast(-infinity)));
  }
}

}  // namespace
}  // namespace mst
