// The product of spmm.cpp for blocks of 1 and 2.
//
// Loop nest, SIMD over tokens:
//
//     for each piece of outputs, packed to [output block][block][B inputs][B outputs]:
//       for each panel of token tiles (threads, dynamic):
//         for each chunk of the reduction:                             a few tens of active elements an output
//           transpose x to [tile][reduction][MV * L tokens]
//           for each line of outputs, tile, output block:
//             B x MV vector accumulators in registers, across the active blocks in the chunk:
//               for each active block, each k:  B broadcasts of W, MV loads of x^T, B * MV multiply-adds
//             add them to the outputs' sums, [output][MV * L tokens]
//             write y once, transposed in registers
//
// See fine.h for what bounds it.
#include "fine.h"
#include "spmm_plan.h"

namespace mst {
namespace {

constexpr int outputs_at_once = 8;          // written to y

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
  for (int64_t o = 0; o < outputs; o += N)
    for (int v = 0; v * L < tokens; v++) {
      vf acc[N][1];
      MST_UNROLL for (int r = 0; r < N; r++) acc[r][0] = load(sums + ((o + r) * MV + v) * L);
      store_tile<N, 1>(acc, y + v * L * ldy + o, ldy, static_cast<int>(std::min<int64_t>(N, outputs - o)),
                       tokens - v * L);
    }
}

// ---- the loops -----------------------------------------------------------------------------------------------------

template <int B, class X, class W> struct Kernel {
  static constexpr int64_t MT = fine_tokens;
  const Problem& p;
  const Plan plan;
  const int64_t chunks;
  const X* x;
  int64_t ldx;
  X* y;
  int64_t ldy;

  Kernel(const Problem& problem, const MstSpmm& a)
      : p(problem), plan(make_plan(p, B, MT, chunk(), fine_panel_bytes)), chunks(ceil_div(p.red_blocks, plan.chunk)),
        x(static_cast<const X*>(a.x)), ldx(a.ldx), y(static_cast<X*>(a.y)), ldy(a.ldy) {}

  int64_t chunk() const { return fine_chunk(B, p.out_blocks, p.red_blocks, p.lists.ptr[p.out_blocks]); }

  // A piece holds, behind W, where each chunk begins in the list of each output block.
  int64_t packed_floats(int64_t begin, int64_t end) const {
    return blocks_of(begin, end) * B * B + (end - begin) * (chunks + 1);
  }
  int64_t blocks_of(int64_t begin, int64_t end) const { return p.lists.ptr[end] - p.lists.ptr[begin]; }
  int32_t* cuts_of(const Piece& piece, int64_t i) const {
    float* behind = piece.w + blocks_of(piece.begin, piece.end) * B * B;
    return reinterpret_cast<int32_t*>(behind) + (i - piece.begin) * (chunks + 1);
  }

  void pack(const Piece& piece, int64_t i) const {
    const int64_t begin = p.lists.ptr[i], n = p.lists.ptr[i + 1] - begin;
    const int32_t* idx = p.lists.idx + begin;
    float* to = piece.w + (begin - piece.w_base) * B * B;
    const W* w = static_cast<const W*>(p.w);
    const int64_t by_output = p.outputs_are_rows ? p.ldw : 1, by_input = p.outputs_are_rows ? 1 : p.ldw;
    for (int64_t q = 0; q < n; q++)
      for (int k = 0; k < B; k++)
        for (int r = 0; r < B; r++) {
          const int64_t input = idx[q] * B + k, output = i * B + r;
          const bool inside = B == 1 || (input < p.reduction && output < p.outputs);
          *to++ = inside ? rounded<X>(w[output * by_output + input * by_input]) : 0.0f;
        }
    cut_list(p.lists.idx, begin, begin + n, 0, plan.chunk, chunks, cuts_of(piece, i));
  }

  // The sums of a piece's outputs for each tile; without several chunks, of a line of outputs alone.
  int64_t sum_outputs(const Piece& piece) const {
    const int64_t outputs = chunks > 1 ? (piece.end - piece.begin) * B : line_outputs;
    return ceil_div(outputs, outputs_at_once) * outputs_at_once;
  }
  int64_t scratch_floats(const Piece& piece) const {
    return plan.panel_tiles() * plan.tile_size + (chunks > 1 ? plan.panel_tiles() : 1) * sum_outputs(piece) * MT;
  }

  // Output blocks [i0, i1), one line, of chunk c of a tile.
  template <int MV>
  void run_line(const Piece& piece, int64_t i0, int64_t i1, int64_t c, const float* xt, float* sums, X* to,
                int tokens) const {
    const bool last = c + 1 == chunks;
    if (last)  // the lines of y arrive while the sums are computed
      for (int t = 0; t < tokens; t++)
        for (int64_t o = 0; o < (i1 - i0) * B; o += 64 / sizeof(X)) __builtin_prefetch(to + t * ldy + i0 * B + o, 1, 3);
    const float* from = xt - c * plan.chunk * B * MV * L;
    for (int64_t i = i0; i < i1; i++) {
      const int32_t* cuts = cuts_of(piece, i) + c;
      tile<B, MV>(from, piece.w + (cuts[0] - piece.w_base) * B * B, p.lists.idx + cuts[0], cuts[1] - cuts[0],
                  c == 0 ? p.bias + i * B : nullptr, sums + (i - i0) * B * MV * L);
    }
    if (last) write_outputs<MV>(sums, std::min(p.outputs, i1 * B) - i0 * B, tokens, to + i0 * B, ldy);
  }

  template <int MV> void pack_x(int64_t t, int64_t c, float* to) const {
    const int64_t c0 = c * plan.chunk, c1 = std::min(p.red_blocks, c0 + plan.chunk);
    pack_tile<F32, MV>(x + t * MT * ldx, ldx, std::min(MT, p.m - t * MT), p.reduction, c0 * B, (c1 - c0) * B, to);
  }

  void panel(const Piece& piece, int64_t t0, int64_t t1, int64_t o0, int64_t o1, float* scratch) const {
    constexpr int64_t span = line_outputs / B;
    const int64_t outs = sum_outputs(piece);
    float* sums = scratch + plan.panel_tiles() * plan.tile_size;
    for (int64_t c = 0; c < chunks; c++) {
      for (int64_t t = t0; t < t1; t++) {
        float* to = scratch + (t - t0) * plan.tile_size;
        by_vectors(t, [&](auto mv) { pack_x<mv>(t, c, to); });
      }
      for (int64_t i = o0; i < o1; i += span)
        for (int64_t t = t0; t < t1; t++) {
          const float* xt = scratch + (t - t0) * plan.tile_size;
          float* to = chunks > 1 ? sums + ((t - t0) * outs + (i - o0) * B) * MT : sums;
          const int tokens = static_cast<int>(std::min(MT, p.m - t * MT));
          by_vectors(t, [&](auto mv) {
            run_line<mv>(piece, i, std::min(o1, i + span), c, xt, to, y + t * MT * ldy, tokens);
          });
        }
    }
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
