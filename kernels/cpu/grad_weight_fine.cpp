// The weight gradient of grad_weight.cpp for blocks of 1 and 2.
//
// Loop nest, SIMD over tokens:
//
//     for each thread's part of W, each piece of its block rows:
//       for each panel of token tiles:
//         transpose a (this piece's rows) to [tile][row][MV * L tokens]; add up its columns if asked
//         for each chunk of columns, a few tens of active elements of a row:
//           transpose b likewise
//           for each block row, tile:
//             B x MV vectors of a in registers
//             for each four active elements (B = 1), each active block (B = 2):
//               MV loads of b a column, B * MV multiply-adds, to four accumulators
//               add up their lanes, all four at once; L of them then make one vector of the sums
//       write the piece's rows of `out` once
//
// See fine.h for what bounds it.
#include "fine.h"
#include "grad_weight_parts.h"
#include "tokens.h"

namespace mst {
namespace {

constexpr int V = fine_vectors;
constexpr int64_t MT = fine_tokens;

// Adds the sums over the tokens of a tile of each of `n` lines to colsum.
void add_lines(const float* lines, int64_t n, float* colsum) {
  for (int64_t k = 0; k < n; k += L) {
    vf four[L / 4];
    for (int i = 0; i < L / 4; i++) {
      vf sum[4];
      for (int j = 0; j < 4; j++) {
        const float* line = lines + (k + 4 * i + j) * MT;
        sum[j] = load(line);
        for (int v = 1; v < V; v++) sum[j] += load(line + v * L);
      }
      four[i] = sum_lanes4(sum[0], sum[1], sum[2], sum[3]);
    }
    float sums[L];
    store(sums, sum_groups(four));
    for (int64_t j = 0; j < std::min<int64_t>(L, n - k); j++) colsum[k + j] += sums[j];
  }
}

// Four active elements, those of blocks idx[0], ...: in each group of four lanes, the sums over that group.
template <int B> MST_INLINE vf sum_four(const vf (&a)[B][V], const float* b, const int32_t* idx) {
  vf acc[4];
  MST_UNROLL for (int g = 0; g < 4 / (B * B); g++) {
    const float* from = b + idx[g] * (B * MT);
    MST_UNROLL for (int c = 0; c < B; c++)
      MST_UNROLL for (int v = 0; v < V; v++) {
        const vf x = load(from + (c * V + v) * L);
        MST_UNROLL for (int r = 0; r < B; r++) {
          vf& to = acc[(g * B + r) * B + c];
          to = v == 0 ? a[r][0] * x : F32::multiply_add(a[r][v], x, to);
        }
      }
  }
  return sum_lanes4(acc[0], acc[1], acc[2], acc[3]);
}

// Adds the products of a tile's tokens to the sums of `n` blocks of one block row. b: shifted so that block idx[q] starts
// at idx[q] * B lines.
template <int B> MST_NOINLINE void block_row(const float* a, const float* b, const int32_t* idx, int64_t n, float* sums) {
  constexpr int per_four = 4 / (B * B), at_once = L / (B * B);  // blocks
  vf x[B][V];
  MST_UNROLL for (int r = 0; r < B; r++) MST_UNROLL for (int v = 0; v < V; v++) x[r][v] = load(a + (r * V + v) * L);
  int64_t q = 0;
  for (; q + at_once <= n; q += at_once) {
    vf four[L / 4];
    MST_UNROLL for (int i = 0; i < L / 4; i++) four[i] = sum_four<B>(x, b, idx + q + i * per_four);
    store(sums + q * B * B, load(sums + q * B * B) + sum_groups(four));
  }
  for (; q < n; q += per_four) {
    const int filled = static_cast<int>(std::min<int64_t>(per_four, n - q));
    int32_t some[per_four];
    for (int g = 0; g < per_four; g++) some[g] = idx[q + std::min(g, filled - 1)];
    const vf four[L / 4] = {sum_four<B>(x, b, some)};
    float lanes[L];
    store(lanes, sum_groups(four));
    for (int i = 0; i < filled * B * B; i++) sums[q * B * B + i] += lanes[i];
  }
}

// ---- the loops -----------------------------------------------------------------------------------------------------

template <int B, class E, class O> struct Worker : Sums<B, B, O> {
  using Sums<B, B, O>::p, Sums<B, B, O>::part, Sums<B, B, O>::slot, Sums<B, B, O>::sums;
  const E *const a = static_cast<const E*>(p.a), *const b = static_cast<const E*>(p.b);
  int64_t chunk = 0, chunks = 0, tiles = 0;  // tiles: of a panel
  std::vector<int32_t> cuts = {};

  Worker(const Problem& problem, Part mine) : Sums<B, B, O>{problem, mine} {}

  // Lines [k0, k0 + n) of one tile, zero past the last token; adds up their columns if asked.
  static void pack(const E* from, int64_t ld, int64_t tokens, int64_t width, int64_t k0, int64_t n, float* to,
                   float* colsum) {
    pack_tile<F32, V>(from, ld, tokens, width, k0, n, to);
    for (int64_t k = 0; tokens < MT && k < ceil_div(n, L) * L; k++)
      memset(to + k * MT + tokens, 0, (MT - tokens) * sizeof(float));
    if (colsum) add_lines(to, std::min(n, width - k0), colsum + k0);
  }

  void cut_lists(int64_t i0, int64_t i1) {
    cuts.resize((i1 - i0) * (chunks + 1));
    for (int64_t i = i0; i < i1; i++) {
      const Range range = active(p, i, part.j0, part.j1);
      cut_list(p.lists.idx, range.begin, range.end, part.j0, chunk, chunks, cuts.data() + (i - i0) * (chunks + 1));
    }
  }

  void accumulate(int64_t i0, int64_t i1, float* pa, float* pb, float* sum_a, float* sum_b) {
    const int64_t size_a = lines(i1 - i0) * MT, size_b = lines(chunk) * MT;
    for (int64_t m0 = 0; m0 < p.m; m0 += tiles * MT) {
      const int64_t here = std::min(tiles, ceil_div(p.m - m0, MT));
      const auto tokens = [&](int64_t t) { return std::min(MT, p.m - m0 - t * MT); };
      for (int64_t t = 0; t < here; t++)
        pack(a + (m0 + t * MT) * p.lda, p.lda, tokens(t), p.rows, i0 * B, (i1 - i0) * B, pa + t * size_a, sum_a);
      for (int64_t c = 0; c < chunks; c++) {
        const int64_t j0 = part.j0 + c * chunk, j1 = std::min(part.j1, j0 + chunk);
        for (int64_t t = 0; t < here; t++)
          pack(b + (m0 + t * MT) * p.ldb, p.ldb, tokens(t), p.cols, j0 * B, (j1 - j0) * B, pb + t * size_b, sum_b);
        for (int64_t i = i0; i < i1; i++) {
          const int32_t* cut = cuts.data() + (i - i0) * (chunks + 1);
          float* to = sums + (slot[i - i0] + cut[c] - cut[0]) * B * B;
          for (int64_t t = 0; t < here; t++)
            block_row<B>(pa + t * size_a + (i - i0) * B * MT, pb + t * size_b - j0 * B * MT, p.lists.idx + cut[c],
                         cut[c + 1] - cut[c], to);
        }
      }
    }
  }

  static int64_t lines(int64_t blocks) { return blocks * B + L; }

  int run() {
    static thread_local Scratch memory;
    const int64_t length = part.j1 - part.j0, share = static_cast<int64_t>(p.lists.ptr[p.R]) * length / std::max<int64_t>(1, p.C);
    chunk = std::max<int64_t>(1, fine_chunk(B, p.R, length, share));
    chunks = ceil_div(length, chunk);
    tiles = std::max<int64_t>(1, fine_panel_bytes / (chunk * B * MT * 4));
    const int status = this->by_piece([&](int64_t i0, int64_t i1, bool sum_a, bool sum_b) {
      cut_lists(i0, i1);
      float* pa = memory.floats((lines(i1 - i0) + lines(chunk)) * tiles * MT);
      if (!pa) return false;
      float* pb = pa + lines(i1 - i0) * tiles * MT;
      accumulate(i0, i1, pa, pb, sum_a ? p.colsum : nullptr, sum_b ? p.colsum : nullptr);
      return true;
    });
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
    return a.block == 1 ? run_parts<Worker<1, E, O>>(p) : run_parts<Worker<2, E, O>>(p);
  });
}

}  // namespace mst
