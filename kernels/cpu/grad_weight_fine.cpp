// The weight gradient of grad_weight.cpp for blocks of 1 and 2.
//
// Loop nest, SIMD over tokens:
//
//     for each thread's part of W, each piece of its block rows:
//       for each panel of token tiles:
//         transpose a (this piece's rows) and b to [tile][line][MV * L tokens], with bf16 dot products twice as many;
//           add up their columns if asked
//         for each group of rows, which stays in L2:
//           for each chunk of columns, a few tens of active elements of a row:
//             for each block row, tile:
//               B x MV vectors of a in registers
//               for each four active elements (B = 1), each active block (B = 2):
//                 MV loads of b a column, B * MV multiply-adds, to four accumulators
//                 add up their lanes, all four at once; L of them then make one vector of the sums
//       write the piece's rows of `out` once
//
// See fine.h for what bounds it.
#include "fine.h"
#include "grad_weight_parts.h"
#include "tokens.h"

namespace mst {
namespace {

constexpr int V = fine_vectors;

// A line's sum over its tokens, in parts, one a lane.
template <class U> MST_INLINE vf sum_line(const float* line) {
  float ones;
  typename U::element one[U::per_unit];
  for (auto& element : one) from_float(1.0f, &element);
  memcpy(&ones, one, 4);
  vf sum{};
  MST_UNROLL for (int v = 0; v < V; v++) sum = U::multiply_add(broadcast(ones), load(line + v * L), sum);
  return sum;
}

// Adds the sums over the tokens of a tile of each of `n` lines to colsum.
template <class U> void add_lines(const float* lines, int64_t n, float* colsum) {
  for (int64_t k = 0; k < n; k += L) {
    vf four[L / 4];
    for (int i = 0; i < L / 4; i++) {
      vf sum[4];
      for (int j = 0; j < 4; j++) sum[j] = sum_line<U>(lines + (k + 4 * i + j) * fine_floats);
      four[i] = sum_lanes4(sum[0], sum[1], sum[2], sum[3]);
    }
    float sums[L];
    store(sums, sum_groups(four));
    for (int64_t j = 0; j < std::min<int64_t>(L, n - k); j++) colsum[k + j] += sums[j];
  }
}

// Four active elements, those of blocks idx[0], ...: in each group of four lanes, the sums over that group.
template <class U, int B> MST_INLINE vf sum_four(const vf (&a)[B][V], const float* b, const int32_t* idx) {
  vf acc[4];
  MST_UNROLL for (int g = 0; g < 4 / (B * B); g++) {
    const float* from = b + idx[g] * (B * fine_floats);
    MST_UNROLL for (int c = 0; c < B; c++)
      MST_UNROLL for (int v = 0; v < V; v++) {
        const vf x = load(from + (c * V + v) * L);
        MST_UNROLL for (int r = 0; r < B; r++) {
          vf& to = acc[(g * B + r) * B + c];
          if (v == 0 && U::per_unit == 1)
            to = a[r][0] * x;
          else
            to = U::multiply_add(a[r][v], x, v == 0 ? vf{} : to);
        }
      }
  }
  return sum_lanes4(acc[0], acc[1], acc[2], acc[3]);
}

// Adds the products of a tile's tokens to the sums of `n` blocks of one block row. b: shifted so that block idx[q]
// starts at idx[q] * B lines.
template <class U, int B>
MST_NOINLINE void block_row(const float* a, const float* b, const int32_t* idx, int64_t n, float* sums) {
  constexpr int per_four = 4 / (B * B), at_once = L / (B * B);  // blocks
  vf x[B][V];
  MST_UNROLL for (int r = 0; r < B; r++) MST_UNROLL for (int v = 0; v < V; v++) x[r][v] = load(a + (r * V + v) * L);
  int64_t q = 0;
  for (; q + at_once <= n; q += at_once) {
    vf four[L / 4];
    MST_UNROLL for (int i = 0; i < L / 4; i++) four[i] = sum_four<U, B>(x, b, idx + q + i * per_four);
    store(sums + q * B * B, load(sums + q * B * B) + sum_groups(four));
  }
  for (; q < n; q += per_four) {
    const int filled = static_cast<int>(std::min<int64_t>(per_four, n - q));
    int32_t some[per_four];
    for (int g = 0; g < per_four; g++) some[g] = idx[q + std::min(g, filled - 1)];
    const vf four[L / 4] = {sum_four<U, B>(x, b, some)};
    float lanes[L];
    store(lanes, sum_groups(four));
    for (int i = 0; i < filled * B * B; i++) sums[q * B * B + i] += lanes[i];
  }
}

// ---- the loops -----------------------------------------------------------------------------------------------------

// Block rows [i0, i1) next to each other: where each one's share of each chunk begins, and all their blocks' columns.
struct Line {
  int64_t i0, i1;
  int32_t *cuts, *idx;
  float* sums;
};

template <class U, int B, class E, class O> struct Worker : Pieces {
  static constexpr int64_t MT = fine_floats * U::per_unit;  // tokens of a tile
  const E *const a = static_cast<const E*>(p.a), *const b = static_cast<const E*>(p.b);
  O* const out = static_cast<O*>(p.out);
  int64_t chunk = 0, chunks = 0;  // of columns
  int32_t* lists = nullptr;       // of a piece's lines

  Worker(const Problem& problem, Part mine) : Pieces{problem, mine} {}

  // Lines [k0, k0 + n) of one tile, zero past the last token; adds up their columns if asked.
  static void pack(const E* from, int64_t ld, int64_t tokens, int64_t width, int64_t k0, int64_t n, float* to,
                   float* colsum) {
    if constexpr (U::per_unit == 2) {
      pack_lines<V>(from, ld, tokens, width, k0, n, to);
    } else {
      pack_tile<U, V>(from, ld, tokens, width, k0, n, to);
      for (int64_t k = 0; tokens < MT && k < ceil_div(n, L) * L; k++)
        memset(to + k * MT + tokens, 0, (MT - tokens) * sizeof(float));
    }
    if (colsum) add_lines<U>(to, std::min(n, width - k0), colsum + k0);
  }

  static int64_t lines(int64_t rows) { return ceil_div(rows, line_lists); }
  Line line(int64_t i0, int64_t i1, int64_t i) const {
    const int64_t before = slot[i - i0], cuts = chunks * line_lists + 1;
    int32_t* at = lists + before + lines(i - i0) * cuts;
    return {i, std::min(i1, i + line_lists), at, at + cuts, sums + before * B * B};
  }

  void arrange(const Line& to) const {
    int32_t* next = to.idx;
    const auto list = [&](int64_t i) {
      const Range range = active(p, i, part.j0, part.j1);
      return std::pair<int64_t, int64_t>(range.begin, range.end);
    };
    arrange_line(p.lists.idx, to.i0, to.i1, part.j0, chunk, chunks, list, to.cuts,
                 [&](int64_t, int64_t q) { *next++ = p.lists.idx[q]; });
  }

  void write(const Line& from) const {
    const int64_t c0 = part.j0 * B, c1 = std::min(p.cols, part.j1 * B);
    for (int64_t r = from.i0 * B; r < std::min(p.rows, from.i1 * B); r++)
      memset(static_cast<void*>(out + r * p.ldo + c0), 0, (c1 - c0) * sizeof(O));
    for (int64_t k = 0; k < chunks * line_lists; k++)
      for (int32_t q = from.cuts[k]; q < from.cuts[k + 1]; q++)
        for (int r = 0; r < B; r++)
          for (int c = 0; c < B; c++) {
            const int64_t row = (from.i0 + k % line_lists) * B + r, col = static_cast<int64_t>(from.idx[q]) * B + c;
            if (B == 1 || (row < p.rows && col < p.cols))
              from_float(from.sums[(q * B + r) * B + c], out + row * p.ldo + col);
          }
  }

  void accumulate(int64_t i0, int64_t i1, float* pa, float* pb, float* sum_a, float* sum_b) {
    constexpr int64_t panel = fine_tiles * MT;
    const int64_t group = fine_group(B * fine_floats);
    const int64_t columns = part.j1 - part.j0, size_a = floats(i1 - i0), size_b = floats(columns);
    for (int64_t m0 = 0; m0 < p.m; m0 += panel) {
      const int64_t tiles = ceil_div(std::min(panel, p.m - m0), MT);
      for (int64_t t = 0, m = m0; t < tiles; t++, m += MT) {
        const int64_t tokens = std::min(MT, p.m - m);
        pack(a + m * p.lda, p.lda, tokens, p.rows, i0 * B, (i1 - i0) * B, pa + t * size_a, sum_a);
        pack(b + m * p.ldb, p.ldb, tokens, p.cols, part.j0 * B, columns * B, pb + t * size_b, sum_b);
      }
      for (int64_t g = i0; g < i1; g += group)
        for (int64_t c = 0; c < chunks; c++)
          for (int64_t i = g; i < std::min(i1, g + group); i += line_lists) {
            const Line row = line(i0, i1, i);
            for (int64_t t = 0; t < tiles; t++)
              for (int64_t k = 0; k < row.i1 - row.i0; k++) {
                const int32_t* cut = row.cuts + c * line_lists + k;
                block_row<U, B>(pa + t * size_a + (i - i0 + k) * B * fine_floats,
                                pb + t * size_b - part.j0 * B * fine_floats,
                             row.idx + cut[0], cut[1] - cut[0], row.sums + cut[0] * B * B);
              }
          }
    }
  }

  static int64_t floats(int64_t blocks) { return (blocks * B + U::per_unit * L) * fine_floats; }  // of a tile

  int run() {
    static thread_local Scratch memory, list_memory;
    const int64_t columns = part.j1 - part.j0;
    chunk = fine_chunk<U>(B, B * fine_floats, p.R, p.C, p.lists.ptr[p.R]);
    chunks = ceil_div(columns, chunk);
    const int status = each([&](int64_t i0, int64_t i1, int64_t blocks, bool sum_a, bool sum_b) {
      lists = reinterpret_cast<int32_t*>(list_memory.floats(blocks + lines(i1 - i0) * (chunks * line_lists + 1)));
      float* pa = memory.floats(fine_tiles * (floats(i1 - i0) + floats(columns)));
      if (!lists || !pa) return false;
      for (int64_t i = i0; i < i1; i += line_lists) arrange(line(i0, i1, i));
      memset(sums, 0, blocks * B * B * 4);
      float* pb = pa + fine_tiles * floats(i1 - i0);
      if (blocks || sum_a || sum_b)
        accumulate(i0, i1, pa, pb, sum_a ? p.colsum : nullptr, sum_b ? p.colsum : nullptr);
      for (int64_t i = i0; i < i1; i += line_lists) write(line(i0, i1, i));
      return true;
    });
    list_memory.trim();
    memory.trim();
    return status;
  }
};

}  // namespace

int grad_weight_fine(const MstGradWeight& a) {
  return by_gradient(a.in_dtype, a.out_dtype, [&](auto in, auto out) {
    using E = typename decltype(in)::type;
    using O = typename decltype(out)::type;
    const Problem p(a);
    using U = typename UnitOf<E>::type;
    return a.block == 1 ? run_parts<Worker<U, 1, E, O>>(p) : run_parts<Worker<U, 2, E, O>>(p);
  });
}

}  // namespace mst
