// Packing the operands of the block-sparse product: W to groups of outputs, x to tiles of tokens.
#pragma once
#include "common.h"

namespace mst {
namespace {

// One call, by outputs and reduction.
struct Problem {
  int block;
  int64_t outputs, reduction;  // elements
  int64_t out_blocks, red_blocks;
  Lists lists;  // active reduction blocks of each output block
  const void* w;
  int64_t ldw;
  bool outputs_are_rows;
  const float* bias = nullptr;  // padded to whole blocks, not null when tiles run
  int64_t m;
  int threads;

  explicit Problem(const MstSpmm& a)
      : block(a.block), w(a.w), ldw(a.ldw), outputs_are_rows(a.outputs_are_rows), m(a.m),
        threads(std::max(1, a.threads)) {
    const int64_t R = ceil_div(a.rows, block), C = ceil_div(a.cols, block);
    outputs = a.rows, reduction = a.cols, out_blocks = R, red_blocks = C;
    if (!outputs_are_rows) std::swap(outputs, reduction), std::swap(out_blocks, red_blocks);
    lists = outputs_are_rows ? by_rows(a.index, R) : by_cols(a.index, R, C);
  }
};

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
      for (int c = 0; c < n; c++) {
        X rounded;
        from_float(to_float(src[c]), &rounded);
        out[r * B + c] = to_float(rounded);
      }
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

// ---- packing x -----------------------------------------------------------------------------------------------------

// xt[k][MV * L] = unit k0 + k of each token of a tile, zero beyond the reduction. Tokens past the last repeat it.
template <class U, int MV, class X>
void pack_tile(const X* x, int64_t ldx, int64_t tokens, int64_t reduction, int64_t k0, int64_t units, float* xt) {
  for (int v = 0; v < MV; v++) {
    const X* rows[L];
    for (int i = 0; i < L; i++) rows[i] = x + std::min<int64_t>(v * L + i, tokens - 1) * ldx + k0;
    const int64_t whole = std::min(units, (reduction - k0) / (L * U::per_unit) * L);
    int64_t k = 0;
    for (; k < whole; k += L) {
      transpose_units<U>(rows, xt + (k * MV + v) * L, MV * L);
      for (int i = 0; i < L; i++) rows[i] += L * U::per_unit;
    }
    for (; k < units; k += L) {
      X edge[L][L * U::per_unit] = {};
      const int64_t left = std::min<int64_t>(L * U::per_unit, reduction - k0 - k * U::per_unit);
      for (int i = 0; i < L; i++) {
        if (left > 0) memcpy(static_cast<void*>(edge[i]), rows[i], left * sizeof(X));
        rows[i] = edge[i];
      }
      transpose_units<U>(rows, xt + (k * MV + v) * L, MV * L);
      for (int i = 0; i < L; i++)
        rows[i] = x + std::min<int64_t>(v * L + i, tokens - 1) * ldx + k0 + (k + L) * U::per_unit;
    }
  }
}

}  // namespace
}  // namespace mst
