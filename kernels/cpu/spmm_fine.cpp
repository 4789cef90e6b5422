// The product of spmm.cpp for blocks of 1 and 2.
//
// Loop nest, SIMD over tokens:
//
//     for each piece of outputs, packed to [line of outputs][chunk][output block][block][B inputs][B outputs]:
//       for each panel of token tiles (threads, dynamic):
//         transpose x to [tile][reduction][MV * L tokens]
//         for each group of outputs, whose sums stay in L2:
//           for each chunk of the reduction, a few tens of active elements of an output:
//             for each line of outputs, tile, output block:
//               B x MV vector accumulators in registers, across the active blocks in the chunk:
//                 for each active block, each k:  B broadcasts of W, MV loads of x^T, B * MV multiply-adds
//               add them to the outputs' sums, [output][MV * L tokens]
//               after the last chunk write y, transposed in registers
//
// See fine.h for what bounds it.
#include "fine.h"
#include "spmm_plan.h"

namespace mst {
namespace {

constexpr int outputs_at_once = 8;  // written to y

template <int B, int MV> MST_INLINE void add_block(const float* x, const float* w, vf (&acc)[B][MV]) {
  MST_UNROLL for (int k = 0; k < B; k++) {
    vf a[B];
    MST_UNROLL for (int r = 0; r < B; r++) a[r] = broadcast(w[k * B + r]);
    MST_UNROLL for (int v = 0; v < MV; v++) {
      const vf b = load(x + (k * MV + v) * L);
      MST_UNROLL for (int r = 0; r < B; r++) acc[r][v] = F32::multiply_add(a[r], b, acc[r][v]);
    }
  }
}

// x: the tile's x^T shifted so that block idx[q] starts at idx[q] * B rows. Adds to the sums, or to the bias if given.
template <int B, int MV>
MST_NOINLINE void tile(const float* x, const float* w, const int32_t* idx, int64_t n, const float* bias, float* sums) {
  constexpr int sets = B == 1 ? 2 : 1;  // of accumulators: enough independent ones to hide the latency
  constexpr int64_t stride = B * MV * L;
  vf acc[sets][B][MV];
  MST_UNROLL for (int r = 0; r < B; r++)
    MST_UNROLL for (int v = 0; v < MV; v++) {
      acc[0][r][v] = bias ? broadcast(bias[r]) : load(sums + (r * MV + v) * L);
      if (sets == 2) acc[sets - 1][r][v] = vf{};
    }
  int64_t q = 0;
  for (; q + sets <= n; q += sets)
    MST_UNROLL for (int s = 0; s < sets; s++) add_block<B, MV>(x + idx[q + s] * stride, w + (q + s) * B * B, acc[s]);
  if (q < n) add_block<B, MV>(x + idx[q] * stride, w + q * B * B, acc[0]);
  MST_UNROLL for (int r = 0; r < B; r++)
    MST_UNROLL for (int v = 0; v < MV; v++)
      store(sums + (r * MV + v) * L, sets == 2 ? acc[0][r][v] + acc[sets - 1][r][v] : acc[0][r][v]);
}

// The sums of `outputs` outputs to y.
template <int MV, class Y> void write_outputs(const float* sums, int64_t outputs, int tokens, Y* y, int64_t ldy) {
  constexpr int N = outputs_at_once;
  for (int v = 0; v * L < tokens; v++)  // a few rows of y at a time: many may lie in one set of the cache
    for (int64_t o = 0; o < outputs; o += N) {
      vf acc[N][1];
      MST_UNROLL for (int r = 0; r < N; r++) acc[r][0] = load(sums + ((o + r) * MV + v) * L);
      store_tile<N, 1>(acc, y + v * L * ldy + o, ldy, static_cast<int>(std::min<int64_t>(N, outputs - o)),
                       tokens - v * L);
    }
}

// ---- the loops -----------------------------------------------------------------------------------------------------

template <int B, class X, class W> struct Kernel {
  static constexpr int64_t MT = fine_tokens, span = line_lists, pack_rows = span;
  const Problem& p;
  const int64_t chunk, chunks, group;  // reduction blocks of a chunk, output blocks of a group
  const Plan plan;
  const X* x;
  int64_t ldx;
  X* y;
  int64_t ldy;

  Kernel(const Problem& problem, const MstSpmm& a)
      : p(problem), chunk(fine_chunk(B, p.out_blocks, p.red_blocks, p.lists.ptr[p.out_blocks])),
        chunks(ceil_div(p.red_blocks, chunk)), group(chunks > 1 ? fine_group(B) : span),
        plan(make_plan(p, B, MT, p.red_blocks, fine_tiles * (p.red_blocks * B + L) * MT * 4)),
        x(static_cast<const X*>(a.x)), ldx(a.ldx), y(static_cast<X*>(a.y)), ldy(a.ldy) {}

  // A packed line: where each output block's share of each chunk begins, the blocks' places, their weights.
  struct Line {
    int32_t *cuts, *idx;
    float* w;
  };
  int64_t cuts_floats() const { return chunks * span + 1; }
  int64_t packed_floats(int64_t begin, int64_t end) const {
    return (p.lists.ptr[end] - p.lists.ptr[begin]) * (1 + B * B) + ceil_div(end - begin, span) * cuts_floats();
  }
  Line line(const Piece& piece, int64_t i0, int64_t i1) const {
    auto* cuts = reinterpret_cast<int32_t*>(piece.w + packed_floats(piece.begin, i0));
    int32_t* idx = cuts + cuts_floats();
    return {cuts, idx, reinterpret_cast<float*>(idx + p.lists.ptr[i1] - p.lists.ptr[i0])};
  }

  void pack(const Piece& piece, int64_t i0, int64_t i1) const {
    const W* w = static_cast<const W*>(p.w);
    const int64_t by_output = p.outputs_are_rows ? p.ldw : 1, by_input = p.outputs_are_rows ? 1 : p.ldw;
    Line to = line(piece, i0, i1);
    const auto list = [&](int64_t i) { return std::pair<int64_t, int64_t>(p.lists.ptr[i], p.lists.ptr[i + 1]); };
    arrange_line(p.lists.idx, i0, i1, 0, chunk, chunks, list, to.cuts, [&](int64_t i, int64_t q) {
      *to.idx++ = p.lists.idx[q];
      for (int k = 0; k < B; k++)
        for (int r = 0; r < B; r++) {
          const int64_t input = static_cast<int64_t>(p.lists.idx[q]) * B + k, output = i * B + r;
          const bool inside = B == 1 || (input < p.reduction && output < p.outputs);
          *to.w++ = inside ? rounded<X>(w[output * by_output + input * by_input]) : 0.0f;
        }
    });
  }

  int64_t scratch_floats(const Piece&) const { return plan.panel_tiles() * (plan.tile_size + group * B * MT); }

  // Output blocks [i0, i1), one line, of chunk c of a tile.
  template <int MV>
  void run_line(const Piece& piece, int64_t i0, int64_t i1, int64_t c, const float* xt, float* sums, X* to,
                int tokens) const {
    const bool last = c + 1 == chunks;
    if (last)  // the lines of y arrive while the sums are computed
      for (int t = 0; t < tokens; t++)
        for (int64_t o = 0; o < (i1 - i0) * B; o += 64 / sizeof(X)) __builtin_prefetch(to + t * ldy + i0 * B + o, 1, 3);
    const Line from = line(piece, i0, i1);
    const int32_t* cuts = from.cuts + c * span;
    for (int64_t k = 0; k < i1 - i0; k++)
      tile<B, MV>(xt, from.w + cuts[k] * B * B, from.idx + cuts[k], cuts[k + 1] - cuts[k],
                  c == 0 ? p.bias + (i0 + k) * B : nullptr, sums + k * B * MV * L);
    if (last) write_outputs<MV>(sums, std::min(p.outputs, i1 * B) - i0 * B, tokens, to + i0 * B, ldy);
  }

  void panel(const Piece& piece, int64_t t0, int64_t t1, int64_t o0, int64_t o1, float* scratch) const {
    const auto whole_lines = [&](int64_t o) {
      return std::min(piece.end, piece.begin + ceil_div(o - piece.begin, span) * span);
    };
    o0 = whole_lines(o0), o1 = whole_lines(o1);
    const auto xt = [&](int64_t t) { return scratch + (t - t0) * plan.tile_size; };
    float* sums = scratch + plan.panel_tiles() * plan.tile_size;
    for (int64_t t = t0; t < t1; t++)
      by_vectors(t, [&](auto mv) {
        pack_tile<F32, mv>(x + t * MT * ldx, ldx, std::min(MT, p.m - t * MT), p.reduction, 0, p.red_blocks * B, xt(t));
      });
    for (int64_t g = o0; g < o1; g += group)
      for (int64_t c = 0; c < chunks; c++)
        for (int64_t i = g; i < std::min(o1, g + group); i += span)
          for (int64_t t = t0; t < t1; t++)
            by_vectors(t, [&](auto mv) {
              run_line<mv>(piece, i, std::min(o1, i + span), c, xt(t), sums + ((t - t0) * group + i - g) * B * MT,
                           y + t * MT * ldy, static_cast<int>(std::min(MT, p.m - t * MT)));
            });
  }

  // The vectors that hold the tokens of a tile.
  template <class Body> void by_vectors(int64_t t, Body body) const {
    const int64_t tokens = p.m - t * MT;
    if (tokens > 2 * L) return body(std::integral_constant<int, fine_vectors>{});
    if (tokens > L) return body(std::integral_constant<int, 2>{});
    body(std::integral_constant<int, 1>{});
  }
};

}  // namespace

int spmm_fine(const MstSpmm& a) {
  int status = MST_NO_MEMORY;
  within_memory([&] {
    status = by_product(a.x_dtype, a.w_dtype, [&](auto x, auto w) {
      using X = typename decltype(x)::type;
      using W = typename decltype(w)::type;
      const Problem p(a);
      return a.block == 1 ? run_steps(Kernel<1, X, W>(p, a)) : run_steps(Kernel<2, X, W>(p, a));
    });
  });
  return status;
}

}  // namespace mst
