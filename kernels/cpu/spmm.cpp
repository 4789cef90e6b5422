// Block-sparse matrix times tokens: y = x . W^T (forward) and dx = dy . W (grad-input), or the reverse for a weight
// stored transposed. "Outputs" below are the block rows (CSR) or block columns (CSC) of W, "reduction" the other side.
//
// Loop nest, SIMD over tokens:
//
//     for each piece of outputs whose active blocks fit in `piece_bytes`:      bounds memory for huge layers
//       pack the active blocks of W to [output group][block][reduction][NR]     shared by the threads
//       for each panel of token tiles (threads, dynamic):                       panel stays in L2
//         for each chunk of the reduction:                                      one chunk unless the reduction is long
//           transpose x to [tile][reduction][MV * L tokens]
//           for each output block, tile, group of NR outputs:
//             NR x MV vector accumulators in registers, across ALL active blocks of the output block:
//               for each active block, each k:  MV loads of x^T, NR broadcasts of W, NR * MV multiply-adds
//             write y once, transposed in registers, bias included
//
// Intensity: NR * MV multiply-adds for NR + MV loads, 24 for 11 with AVX-512 (32 registers: 8 x 3; 4 x 6 for blocks of
// 4) and 8 for 6 with 16 registers. There 4 x 3 would be 12 for 7 and fill all of them: compilers then spill sums within
// the loop, or load x^T once more for each multiply-add, and two thirds of the speed are left. W comes from L1, where it is reused by each tile of a panel, x^T from L2, y goes
// out once. Nothing depends on the block size but the length of the innermost loop, so fine blocks cost little.
#include "spmm_plan.h"

namespace mst {
namespace {

constexpr int wide_outputs = L == 16 ? 8 : 4, wide_vectors = L == 16 ? 3 : 2, narrow_vectors = L == 16 ? 6 : 2;
constexpr int line_outputs = 32;  // outputs written to a tile's tokens together, so that lines of y fill up
constexpr int64_t pack_rows = 4;  // output blocks packed at a time

// ---- the tile ------------------------------------------------------------------------------------------------------

// Where the accumulators of a tile start and end: bias or earlier partial sums in, partial sums or y out.
template <class Y> struct TileEnds {
  const float* bias;
  const float* partial_in;  // [NR][MV * L] or null
  float* partial_out;       // or null: write y
  Y* y;
  int64_t ldy;
  int outputs, tokens;  // of y, may be less than the tile
};

template <int NR, int MV, class Y> MST_INLINE void finish(const vf (&acc)[NR][MV], const TileEnds<Y>& e) {
  if (e.partial_out) {
    MST_UNROLL for (int r = 0; r < NR; r++)
      MST_UNROLL for (int v = 0; v < MV; v++) store(e.partial_out + (r * MV + v) * L, acc[r][v]);
    return;
  }
  const bool whole = e.outputs >= NR && e.tokens >= MV * L;
  Y edge[MV * L][NR];
  Y* y = whole ? e.y : edge[0];
  const int64_t ldy = whole ? e.ldy : NR;
  MST_UNROLL for (int v = 0; v < MV; v++) {
    vf column[NR];
    MST_UNROLL for (int r = 0; r < NR; r++) column[r] = acc[r][v];
    store_transposed<NR>(column, y + v * L * ldy, ldy);
  }
  if (whole) return;
  const int outputs = std::min(e.outputs, NR), tokens = std::min(e.tokens, MV * L);
  for (int t = 0; t < tokens; t++) memcpy(static_cast<void*>(e.y + t * e.ldy), edge[t], outputs * sizeof(Y));
}

// x: the tile's x^T shifted so that block idx[q] starts at idx[q] * units rows. KU divides units.
template <class U, int NR, int MV, int KU, class Y>
MST_NOINLINE void tile(const float* x, const float* w, const int32_t* idx, int64_t n, int units, const TileEnds<Y>& e) {
  vf acc[NR][MV];
  if (e.partial_in) {
    MST_UNROLL for (int r = 0; r < NR; r++)
      MST_UNROLL for (int v = 0; v < MV; v++) acc[r][v] = load(e.partial_in + (r * MV + v) * L);
  } else {
    MST_UNROLL for (int r = 0; r < NR; r++) MST_UNROLL for (int v = 0; v < MV; v++) acc[r][v] = broadcast(e.bias[r]);
  }
  // The lines of y that the tile ends in arrive while it computes.
  if (!e.partial_out)
    for (int t = 0; t < e.tokens; t++) __builtin_prefetch(e.y + t * e.ldy, 1, 3);
  const int64_t stride = static_cast<int64_t>(units) * MV * L;
  for (int64_t q = 0; q < n; q++) {
    const float* xk = x + idx[q] * stride;
#pragma GCC unroll 1
    for (int k = 0; k < units; k += KU) {
      MST_UNROLL for (int u = 0; u < KU; u++) {
        vf b[MV];
        MST_UNROLL for (int v = 0; v < MV; v++) b[v] = load(xk + (u * MV + v) * L);
        MST_UNROLL for (int r = 0; r < NR; r++) {
          const vf a = broadcast(w[u * NR + r]);
          MST_UNROLL for (int v = 0; v < MV; v++) acc[r][v] = U::multiply_add(a, b[v], acc[r][v]);
        }
      }
      xk += KU * MV * L;
      w += KU * NR;
    }
  }
  finish<NR, MV>(acc, e);
}

// ---- the loops -----------------------------------------------------------------------------------------------------

// A piece of outputs with its packed W, and how the reduction is cut.
struct Piece {
  int64_t begin, end;  // output blocks
  const float* w;
  int64_t w_base;       // lists.ptr[begin]
  int64_t chunk;        // reduction blocks per chunk, a multiple of L, or all
};

// One chunk of the reduction for one tile: all outputs of [begin, end).
template <class U, int NR, int MV, class Y> struct TileRun {
  const Problem& p;
  const Piece& piece;
  int units;

  void operator()(int64_t i, const float* xt, int64_t c0, int64_t c1, float* partial, Y* y, int64_t ldy,
                  int tokens) const {
    const int B = p.block;
    const int32_t* idx = p.lists.idx;
    const int64_t first = p.lists.ptr[i], last = p.lists.ptr[i + 1];
    int64_t q0 = first, q1 = last;
    if (c0 > 0) q0 = std::lower_bound(idx + first, idx + last, static_cast<int32_t>(c0)) - idx;
    if (c1 < p.red_blocks) q1 = std::lower_bound(idx + first, idx + last, static_cast<int32_t>(c1)) - idx;
    const float* w = piece.w + (first - piece.w_base) * B * units;
    const float* x = xt - c0 * units * MV * L;
    for (int g = 0; g < B / NR; g++) {
      const int64_t o = i * B + g * NR;
      if (o >= p.outputs) break;
      float* sums = partial ? partial + (o - piece.begin * B) * MV * L : nullptr;
      const TileEnds<Y> ends{p.bias + o, c0 > 0 ? sums : nullptr, c1 < p.red_blocks ? sums : nullptr, y + o, ldy,
                             static_cast<int>(std::min<int64_t>(NR, p.outputs - o)), tokens};
      const float* wg = w + (g * (last - first) + q0 - first) * units * NR;
      if (units % 4 == 0)
        tile<U, NR, MV, 4>(x, wg, idx + q0, q1 - q0, units, ends);
      else
        tile<U, NR, MV, 2>(x, wg, idx + q0, q1 - q0, units, ends);
    }
  }
};

// Token tiles [t0, t1) for output blocks [o0, o1) of a piece.
template <class U, int NR, int MV, class X>
void run_panel(const Problem& p, const Piece& piece, const X* x, int64_t ldx, X* y, int64_t ldy, int64_t t0, int64_t t1,
               int64_t o0, int64_t o1, float* xt, float* partial) {
  constexpr int64_t MT = MV * L;
  const int units = p.block / U::per_unit;
  const int64_t tile_size = (piece.chunk * units + L) * MT, outs = (piece.end - piece.begin) * p.block;
  const TileRun<U, NR, MV, X> run{p, piece, units};
  const TileRun<U, NR, 1, X> run_short{p, piece, units};
  for (int64_t c0 = 0; c0 < p.red_blocks; c0 += piece.chunk) {
    const int64_t c1 = std::min(p.red_blocks, c0 + piece.chunk), k0 = c0 * p.block, n = (c1 - c0) * units;
    for (int64_t t = t0; t < t1; t++) {
      const int64_t tokens = std::min(MT, p.m - t * MT);
      float* to = xt + (t - t0) * tile_size;
      if (tokens > L)
        pack_tile<U, MV>(x + t * MT * ldx, ldx, tokens, p.reduction, k0, n, to);
      else
        pack_tile<U, 1>(x + t * MT * ldx, ldx, tokens, p.reduction, k0, n, to);
    }
    const int64_t span = std::max(1, line_outputs / p.block);
    for (int64_t i = o0; i < o1; i += span)
      for (int64_t t = t0; t < t1; t++) {
        const int tokens = static_cast<int>(std::min(MT, p.m - t * MT));
        float* sums = partial ? partial + (t - t0) * outs * MT : nullptr;
        const float* from = xt + (t - t0) * tile_size;
        for (int64_t j = i; j < std::min(o1, i + span); j++)
          if (tokens > L)
            run(j, from, c0, c1, sums, y + t * MT * ldy, ldy, tokens);
          else
            run_short(j, from, c0, c1, sums, y + t * MT * ldy, ldy, tokens);
      }
  }
}

// One thread's share of the steps. Returns false if it could not get memory.
template <class U, int NR, int MV, class X, class W>
bool work(const Problem& p, const Plan& plan, Tickets& tickets, float* w, const X* x, int64_t ldx, X* y, int64_t ldy) {
  static thread_local Scratch packed_x;
  constexpr int64_t MT = MV * L;
  const int64_t block_floats = p.block / U::per_unit * p.block, items = plan.panels * plan.splits;
  const int64_t panel_floats = ceil_div(plan.tiles, plan.panels) * plan.tile_size;
  bool ok = true;
  int64_t ticket = tickets.next(), first = 0;  // `first`: tickets of earlier pieces
  for (size_t s = 0; s + 1 < plan.cuts.size(); s++) {
    const Piece piece{plan.cuts[s], plan.cuts[s + 1], w, p.lists.ptr[plan.cuts[s]], plan.chunk};
    const int64_t n = piece.end - piece.begin, packs = ceil_div(n, pack_rows);
    for (; ticket < first + packs; ticket = tickets.take_next()) {
      tickets.wait_for(first);  // the packed memory is free
      const int64_t i0 = piece.begin + (ticket - first) * pack_rows, i1 = std::min(piece.end, i0 + pack_rows);
      for (int64_t i = i0; i < i1; i++)
        pack_output_block<U, NR, X, W>(p, i, w + (p.lists.ptr[i] - piece.w_base) * block_floats);
    }
    const bool partial = plan.chunk < p.red_blocks, any = ticket < first + packs + items;
    const int64_t sums = partial ? ceil_div(plan.tiles, plan.panels) * n * p.block * MT : 0;
    float* xt = any ? packed_x.floats(panel_floats + sums) : nullptr;
    for (; ticket < first + packs + items; ticket = tickets.take_next()) {
      const int64_t item = ticket - first - packs, panel = item / plan.splits, part = item % plan.splits;
      tickets.wait_for(first + packs);  // all of the piece is packed
      ok = ok && xt;
      if (!ok) continue;
      run_panel<U, NR, MV>(p, piece, x, ldx, y, ldy, panel * plan.tiles / plan.panels,
                           (panel + 1) * plan.tiles / plan.panels, piece.begin + part * n / plan.splits,
                           piece.begin + (part + 1) * n / plan.splits, xt, partial ? xt + panel_floats : nullptr);
    }
    first += packs + items;
  }
  packed_x.trim();
  return ok;
}

template <class U, int NR, int MV, class X, class W> int run_all(const Problem& p, const MstSpmm& a) {
  static thread_local Scratch packed_w;
  const X* x = static_cast<const X*>(a.x);
  X* y = static_cast<X*>(a.y);
  const int64_t units = p.block / U::per_unit;
  const Plan plan = make_plan(p, units, MV * L);
  float* w = packed_w.floats(plan.most_blocks * units * p.block + 64);
  if (!w) return MST_NO_MEMORY;
  Tickets tickets;
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(p.threads)
  if (!work<U, NR, MV, X, W>(p, plan, tickets, w, x, a.ldx, y, a.ldy)) failed = true;
  packed_w.trim();
  return failed ? MST_NO_MEMORY : MST_OK;
}

// The bias as floats, zeros without one, padded to whole blocks.
std::vector<float> padded_bias(const MstSpmm& a, const Problem& p) {
  std::vector<float> padded(p.out_blocks * p.block, 0.0f);
  if (a.bias)
    by_dtype(a.bias_dtype, [&](auto e) {
      const auto* bias = static_cast<const typename decltype(e)::type*>(a.bias);
      for (int64_t o = 0; o < p.outputs; o++) padded[o] = to_float(bias[o]);
      return MST_OK;
    });
  return padded;
}

template <class X, class W> int run(const MstSpmm& a) {
  using U = typename UnitOf<X>::type;
  Problem p(a);
  const std::vector<float> bias = padded_bias(a, p);
  p.bias = bias.data();
  if (p.block == 4) return run_all<U, 4, narrow_vectors, X, W>(p, a);
  return run_all<U, wide_outputs, wide_vectors, X, W>(p, a);
}

}  // namespace
}  // namespace mst

using namespace mst;

MST_API int mst_spmm(const MstSpmm* arguments) {
  const MstSpmm& a = *arguments;
  const int known = by_block(a.block, [](auto) { return MST_OK; });
  if (known != MST_OK || a.m <= 0) return known;
  int status = MST_NO_MEMORY;
  within_memory([&] {
    status = by_product(a.x_dtype, a.w_dtype,
                        [&](auto x, auto w) { return run<typename decltype(x)::type, typename decltype(w)::type>(a); });
  });
  return status;
}
