// The forms in which attention's operands are packed for products of units (elements.h): of floats, or of pairs of bf16.
//
// Rows are queries or keys, `size` numbers, or values and what is as wide as they, `value_size`; either is any number up
// to MST_LARGEST_HEAD. They are packed `width` numbers wide, whole vectors, with zeros behind the size: those add nothing
// to a product, and what they make of a result is not written.
//
// A product sums over units, so an operand that is summed along its rows keeps them as they are, and one that is summed
// over its rows has them joined by twos where units are pairs. Where units are floats, rows are all of the forms at once.
//
//     along    [row][width / per_unit]       rows as they come: the left operand of q k^T and grad v^T
//     across   [units][KT]                   a tile of KT rows, transposed: the right operand of these
//     joined   [row / per_unit][width]       the right operand of p v, ds k, p^T grad and ds^T q
//
// With pairs, probabilities and their slopes ds are rounded to bf16 as they enter a product, as PyTorch's own kernels
// round them; sums, exponentials and the scores themselves are float.
#pragma once
#include "attention_steps.h"
#include "attention_tile.h"

namespace mst {
namespace {

// What tensors of elements E are packed to.
template <class E> struct Packed {
  using unit = typename UnitOf<E>::type;
  static constexpr int per_unit = unit::per_unit;
  static constexpr bool pairs = per_unit == 2;
  using number = std::conditional_t<pairs, E, float>;  // of rows along
};

template <class E> MST_INLINE E* row_of(const MstHeads& t, int64_t batch, int64_t head, int64_t token) {
  return static_cast<E*>(t.data) + batch * t.batch + head * t.head + token * t.token;
}

// One row of `size` numbers, zeros up to `width`.
template <class E, class N> MST_INLINE void read_row(const E* from, int64_t size, int64_t width, N* to) {
  if constexpr (std::is_same_v<E, N>) {
    memcpy(static_cast<void*>(to), from, size * sizeof(E));
  } else {
    int64_t d = 0;
    for (; d + 4 <= size; d += 4) store4(to + d, load4(from + d));
    for (; d < size; d++) to[d] = to_float(from[d]);
  }
  memset(static_cast<void*>(to + size), 0, (width - size) * sizeof(N));
}

#if defined(MST_BF16_PAIRS)
MST_INLINE __m256i narrow(vf v) { return (__m256i)_mm512_cvtneps_pbh((__m512)v); }
MST_INLINE __m256i load_half(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
MST_INLINE void store_half(void* p, __m256i v) { _mm256_storeu_si256(static_cast<__m256i*>(p), v); }
MST_INLINE void store_pairs(float* units, __m256i even, __m256i odd) {
  const __m512i low = _mm512_cvtepu16_epi32(even), high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16);
  _mm512_storeu_si512(units, _mm512_or_si512(low, high));
}
#endif

// units[r / 2][d] = (numbers d of row r, of row r + 1), for an even number of rows that stand `apart` numbers from each
// other; `width` is a multiple of L.
template <class E> MST_INLINE void join_rows(const E* rows, int64_t apart, int64_t count, int64_t width, float* units) {
#if defined(MST_BF16_PAIRS)
  for (int64_t r = 0; r < count; r += 2, units += width)
    for (int64_t d = 0; d < width; d += L)
      store_pairs(units + d, load_half(rows + r * apart + d), load_half(rows + (r + 1) * apart + d));
#else
  static_assert(!sizeof(E), "units are floats, and rows need no joining");
#endif
}

// to[u][j] = unit u of row j, for KT rows that stand `apart` numbers from each other and hold a multiple of L units.
template <class U, class N> inline void transpose_tile(const N* from, int64_t apart, float* to) {
  for (int j = 0; j < KT; j += L)
    for (int64_t u = 0; u < apart / U::per_unit; u += L) {
      const N* rows[L];
      for (int i = 0; i < L; i++) rows[i] = from + (j + i) * apart + u * U::per_unit;
      transpose_units<U>(rows, to + u * KT + j, KT);
    }
}

// The rows of a tile of queries.
template <class E> class TileRows {
  using P = Packed<E>;

 public:
  // Reads rows [0, real) of QT, zeros in place of the others.
  void read(const MstHeads& from, int64_t b, int64_t h, int64_t i0, int64_t real, int64_t size, int64_t width) {
    for (int64_t r = 0; r < QT; r++) {
      if (r < real) {
        read_row(row_of<const E>(from, b, h, i0 + r), size, width, numbers_ + r * width);
        if constexpr (P::pairs) read_row(row_of<const E>(from, b, h, i0 + r), size, width, floats_ + r * width);
      } else {
        std::fill_n(numbers_ + r * width, width, typename P::number{});
        if constexpr (P::pairs) std::fill_n(floats_ + r * width, width, 0.0f);
      }
    }
  }
  void join(int64_t width) {
    if constexpr (P::pairs) join_rows(numbers_, width, QT, width, joined_);
  }

  const float* along() const { return reinterpret_cast<const float*>(numbers_); }  // width / per_unit units a row
  const float* joined() const {
    if constexpr (P::pairs) return joined_;
    return along();
  }
  const float* floats() const {
    if constexpr (P::pairs) return floats_;
    return along();
  }

 private:
  alignas(64) typename P::number numbers_[QT * MST_LARGEST_HEAD];
  alignas(64) float joined_[P::pairs ? QT / 2 * MST_LARGEST_HEAD : 1];
  alignas(64) float floats_[P::pairs ? QT * MST_LARGEST_HEAD : 1];
};

}  // namespace
}  // namespace mst
