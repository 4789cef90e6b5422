// The block-sparse product's W, packed to groups of outputs, and its y. (x: tokens.h)
#pragma once
#include <vector>

#include "tokens.h"

namespace mst {

int spmm_fine(const MstSpmm& a);  // mst_spmm for blocks of less than 4
int spmm_few(const MstSpmm& a);   // and for few tokens, with other blocks
int64_t few_tokens(const MstSpmm& a);

namespace {

constexpr int line_outputs = 32;  // outputs written to a tile's tokens together, so that lines of y fill up

// The bias as floats, zeros without one, padded to whole blocks.
std::vector<float> padded_bias(const MstSpmm& a) {
  const int64_t outputs = a.outputs_are_rows ? a.rows : a.cols;
  std::vector<float> padded(ceil_div(outputs, a.block) * a.block, 0.0f);
  if (a.bias)
    by_dtype(a.bias_dtype, [&](auto e) {
      const auto* bias = static_cast<const typename decltype(e)::type*>(a.bias);
      for (int64_t o = 0; o < outputs; o++) padded[o] = to_float(bias[o]);
      return MST_OK;
    });
  return padded;
}

// One call, by outputs and reduction.
struct Problem {
  int block;
  int64_t outputs, reduction;  // elements
  int64_t out_blocks, red_blocks;
  Lists lists;  // active reduction blocks of each output block
  const void* w;
  int64_t ldw;
  bool outputs_are_rows;
  std::vector<float> padded;
  const float* bias;  // of whole blocks
  int64_t m;
  int threads;

  Problem(const Problem&) = delete;
  explicit Problem(const MstSpmm& a)
      : block(a.block), w(a.w), ldw(a.ldw), outputs_are_rows(a.outputs_are_rows), padded(padded_bias(a)),
        bias(padded.data()), m(a.m), threads(std::max(1, a.threads)) {
    const int64_t R = ceil_div(a.rows, block), C = ceil_div(a.cols, block);
    outputs = a.rows, reduction = a.cols, out_blocks = R, red_blocks = C;
    if (!outputs_are_rows) std::swap(outputs, reduction), std::swap(out_blocks, red_blocks);
    lists = outputs_are_rows ? by_rows(a.index, R) : by_cols(a.index, R, C);
  }
};

// A number of W rounded to the precision of X.
template <class X, class W> MST_INLINE float rounded(W w) {
  if constexpr (std::is_same_v<X, W> || std::is_same_v<X, float>) return to_float(w);
  X narrow;
  from_float(to_float(w), &narrow);
  return to_float(narrow);
}

// ---- packing W -----------------------------------------------------------------------------------------------------

// Copies n elements, so few that a call of memcpy would cost more than they do.
template <class E> MST_INLINE void copy_short(const E* src, E* out, int n) {
  int c = 0;
  for (; c + 4 <= n; c += 4) memcpy(static_cast<void*>(out + c), src + c, 4 * sizeof(E));
  for (; c < n; c++) out[c] = src[c];
}

// The block at (row0, col0) of the stored weight, zero beyond the edges: W rounded to the precision of X even if E is
// float, so that the result does not depend on the instruction set.
template <class E, class X, class W>
MST_INLINE void fetch_block(const Problem& p, int64_t row0, int64_t col0, int64_t rows, int64_t cols, E* out) {
  const int B = p.block;
  const int h = static_cast<int>(std::min<int64_t>(B, rows - row0));
  const int n = static_cast<int>(std::min<int64_t>(B, cols - col0));
  constexpr bool round = !std::is_same_v<X, W> && !std::is_same_v<X, float>;
  if (h < B || n < B) memset(static_cast<void*>(out), 0, sizeof(E) * B * B);
  for (int r = 0; r < h; r++) {
    const W* src = static_cast<const W*>(p.w) + (row0 + r) * p.ldw + col0;
    if constexpr (round && std::is_same_v<E, float>)
      for (int c = 0; c < n; c++) out[r * B + c] = rounded<X>(src[c]);
    else if constexpr (std::is_same_v<E, W>)
      copy_short(src, out + r * B, n);
    else if constexpr (std::is_same_v<W, float>)
      convert(src, out + r * B, n);
    else
      for (int c = 0; c < n; c++) out[r * B + c] = to_float(src[c]);
  }
}

// dst[k][r] = unit k of the reduction for output first + r, from a fetched block.
template <class U, int NR, class E>
MST_INLINE void pack_group(const E* from, int B, bool outputs_are_rows, int first, float* dst) {
  const int units = B / U::per_unit;
  if (outputs_are_rows) {  // a unit lies contiguous in its row
    for (int r = 0; r < NR; r += 4) {
      const float* row[4];
      for (int i = 0; i < 4; i++) row[i] = reinterpret_cast<const float*>(from + (first + r + i) * B);
      int k = 0;
      for (; k + 4 <= units; k += 4) {
        v4f a = load4(row[0] + k), b = load4(row[1] + k), c = load4(row[2] + k), d = load4(row[3] + k);
        transpose4(a, b, c, d);
        store4(dst + k * NR + r, a);
        store4(dst + (k + 1) * NR + r, b);
        store4(dst + (k + 2) * NR + r, c);
        store4(dst + (k + 3) * NR + r, d);
      }
      for (; k < units; k++)
        for (int i = 0; i < 4; i++) memcpy(dst + k * NR + r + i, row[i] + k, 4);
    }
  } else if constexpr (U::per_unit == 1) {
    for (int k = 0; k < units; k++) memcpy(dst + k * NR, from + k * B + first, 4 * NR);
  } else {  // a unit is two rows
    for (int k = 0; k < units; k++) {
      uint32_t pair[NR];
      const E *lo = from + 2 * k * B + first, *hi = lo + B;
      for (int r = 0; r < NR; r++) pair[r] = lo[r].bits | static_cast<uint32_t>(hi[r].bits) << 16;
      memcpy(dst + k * NR, pair, 4 * NR);
    }
  }
}

// Packs the active blocks of output block `i` to dst[group][block][unit][NR].
template <class U, int NR, class X, class W>
void pack_output_block(const Problem& p, int64_t i, float* dst) {
  const int B = p.block;
  const int64_t begin = p.lists.ptr[i], n = p.lists.ptr[i + 1] - begin, group = B / U::per_unit * NR;
  using E = typename U::element;
  E from[largest_block * largest_block];
  for (int64_t q = 0; q < n; q++) {
    const int64_t other = static_cast<int64_t>(p.lists.idx[begin + q]) * B;
    if (p.outputs_are_rows)
      fetch_block<E, X, W>(p, i * B, other, p.outputs, p.reduction, from);
    else
      fetch_block<E, X, W>(p, other, i * B, p.reduction, p.outputs, from);
    for (int g = 0; g < B / NR; g++) pack_group<U, NR>(from, B, p.outputs_are_rows, g * NR, dst + (g * n + q) * group);
  }
}

// ---- writing y -----------------------------------------------------------------------------------------------------

// Copies a short row, in vectors.
MST_INLINE void copy_row(const void* from, void* to, int64_t bytes) {
  const char* src = static_cast<const char*>(from);
  char* dst = static_cast<char*>(to);
  int64_t at = 0;
  for (; at + 4 * L <= bytes; at += 4 * L) {
    vf_mem v;
    memcpy(&v, src + at, 4 * L);
    memcpy(dst + at, &v, 4 * L);
  }
  if (at < bytes) memcpy(dst + at, src + at, bytes - at);
}

// y[t * ldy + r] = acc[r] of token t, for the tokens and outputs that y has.
template <int NR, int MV, class Y>
MST_INLINE void store_tile(const vf (&acc)[NR][MV], Y* y, int64_t ldy, int outputs, int tokens) {
  const bool whole = outputs >= NR && tokens >= MV * L;
  Y edge[MV * L][NR];
  Y* to = whole ? y : edge[0];
  const int64_t ld = whole ? ldy : NR;
  MST_UNROLL for (int v = 0; v < MV; v++) {
    vf column[NR];
    MST_UNROLL for (int r = 0; r < NR; r++) column[r] = acc[r][v];
    store_transposed<NR>(column, to + v * L * ld, ld);
  }
  if (whole) return;
  outputs = std::min(outputs, NR), tokens = std::min(tokens, MV * L);
  for (int t = 0; t < tokens; t++) memcpy(static_cast<void*>(y + t * ldy), edge[t], outputs * sizeof(Y));
}

}  // namespace
}  // namespace mst
