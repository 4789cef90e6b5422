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
// 4) and 12 for 7 with 16 registers. W comes from L1, where it is reused by each tile of a panel, x^T from L2, y goes
// out once. Nothing depends on the block size but the length of the innermost loop, so fine blocks cost little.
#include <atomic>
#include <thread>
#include <type_traits>
#include <vector>

#include "common.h"

namespace mst {
namespace {

#if defined(MST_AVX512)
constexpr int wide_outputs = 8, wide_vectors = 3, narrow_vectors = 6;
#else
constexpr int wide_outputs = 4, wide_vectors = 3, narrow_vectors = 3;
#endif
constexpr int64_t panel_bytes = 200 << 10;  // of x^T, if that holds a tile: stays in L2 beside W and y
constexpr int64_t chunk_bytes = 640 << 10;  // one tile of x^T; a longer reduction is cut
constexpr int line_outputs = 32;            // outputs written to a tile's tokens together, so that lines of y fill up
constexpr int64_t pack_rows = 4;            // output blocks packed at a time
constexpr int64_t piece_bytes = 8 << 20;    // of packed W, shared by the threads in L3

struct Problem {
  int block;
  int64_t outputs, reduction;  // elements
  int64_t out_blocks, red_blocks;
  Lists lists;  // active reduction blocks of each output block
  const void* w;
  int64_t ldw;
  bool outputs_are_rows;
  const float* bias;  // padded to whole blocks, never null
  int64_t m;
  int threads;
};

// ---- packing W -----------------------------------------------------------------------------------------------------

// The block at (row0, col0) of the stored weight, converted to E, zero beyond the edges. ROUND: to bf16 precision even
// if E is float, so that the result does not depend on the instruction set.
template <class E, class W, bool ROUND>
MST_INLINE void fetch_block(const Problem& p, int64_t row0, int64_t col0, int64_t rows, int64_t cols, E* out) {
  const int B = p.block;
  const int h = static_cast<int>(std::min<int64_t>(B, rows - row0));
  const int n = static_cast<int>(std::min<int64_t>(B, cols - col0));
  if (h < B || n < B) memset(static_cast<void*>(out), 0, sizeof(E) * B * B);
  for (int r = 0; r < h; r++) {
    const W* src = static_cast<const W*>(p.w) + (row0 + r) * p.ldw + col0;
    if constexpr (ROUND && std::is_same_v<E, float>)
      for (int c = 0; c < n; c++) {
        bf16 rounded;
        from_float(src[c], &rounded);
        out[r * B + c] = to_float(rounded);
      }
    else if constexpr (std::is_same_v<E, W>)
      memcpy(static_cast<void*>(out + r * B), src, sizeof(E) * n);
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
template <class U, int NR, class E, class W, bool ROUND>
void pack_output_block(const Problem& p, int64_t i, float* dst) {
  const int B = p.block;
  const int64_t begin = p.lists.ptr[i], n = p.lists.ptr[i + 1] - begin, group = B / U::per_unit * NR;
  E from[64 * 64];
  for (int64_t q = 0; q < n; q++) {
    const int64_t other = static_cast<int64_t>(p.lists.idx[begin + q]) * B;
    if (p.outputs_are_rows)
      fetch_block<E, W, ROUND>(p, i * B, other, p.outputs, p.reduction, from);
    else
      fetch_block<E, W, ROUND>(p, other, i * B, p.reduction, p.outputs, from);
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

// Cuts the outputs so that the packed blocks of each piece stay within piece_bytes (but at least one output block).
std::vector<int64_t> cut_pieces(const Problem& p, int64_t block_floats) {
  std::vector<int64_t> cuts{0};
  const int64_t limit = std::max<int64_t>(1, piece_bytes / 4 / block_floats);
  for (int64_t i = 0; i < p.out_blocks; i++)
    if (p.lists.ptr[i + 1] - p.lists.ptr[cuts.back()] > limit && i > cuts.back()) cuts.push_back(i);
  cuts.push_back(p.out_blocks);
  return cuts;
}

// Hands out the steps of a call in order. A step waits until all steps before some ticket are done, not until all
// threads have arrived: a thread that another process keeps from running then delays nobody but at the very end.
class Tickets {
 public:
  int64_t next() { return taken_.fetch_add(1, std::memory_order_relaxed); }
  // Finishes the step in hand and takes another.
  int64_t take_next() {
    done_.fetch_add(1, std::memory_order_release);
    return next();
  }
  // Waits until `steps` steps are done. Only right where no step beyond them can be done yet.
  void wait_for(int64_t steps) const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < steps; spins++)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  std::atomic<int64_t> taken_{0}, done_{0};
};

// How a call is cut into steps; see the loop nest on top.
struct Plan {
  std::vector<int64_t> cuts;  // pieces of outputs
  int64_t chunk, tile_size;   // reduction blocks per chunk, floats of one tile of x^T
  int64_t tiles, panels, splits;
  int64_t most_blocks;  // in a piece
};

Plan make_plan(const Problem& p, int64_t units, int64_t MT) {
  Plan plan;
  plan.cuts = cut_pieces(p, units * p.block);
  plan.most_blocks = 0;
  for (size_t s = 0; s + 1 < plan.cuts.size(); s++)
    plan.most_blocks = std::max<int64_t>(plan.most_blocks, p.lists.ptr[plan.cuts[s + 1]] - p.lists.ptr[plan.cuts[s]]);
  const int64_t tile_row = MT * 4 * units;  // bytes of x^T per reduction block
  plan.chunk = p.red_blocks;
  if (plan.chunk * tile_row > chunk_bytes) plan.chunk = std::max<int64_t>(L, chunk_bytes / tile_row / L * L);
  plan.tiles = ceil_div(p.m, MT);
  plan.tile_size = (plan.chunk * units + L) * MT;
  // Even panels, as many as a multiple of the threads; with fewer tiles than threads, the outputs are split as well.
  const int64_t panels = ceil_div(plan.tiles, std::max<int64_t>(1, panel_bytes / 4 / plan.tile_size));
  plan.panels = std::min(plan.tiles, ceil_div(panels, p.threads) * p.threads);
  plan.splits = plan.tiles < p.threads ? ceil_div(p.threads, plan.tiles) : 1;
  return plan;
}

// One thread's share of the steps. Returns false if it could not get memory.
template <class U, int NR, int MV, class X, class W>
bool work(const Problem& p, const Plan& plan, Tickets& tickets, float* w, const X* x, int64_t ldx, X* y, int64_t ldy) {
  static thread_local Scratch packed_x;
  constexpr int64_t MT = MV * L;
  constexpr bool round = sizeof(X) < sizeof(W);
  using E = std::conditional_t<U::per_unit == 2, bf16, float>;
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
        pack_output_block<U, NR, E, W, round>(p, i, w + (p.lists.ptr[i] - piece.w_base) * block_floats);
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

template <class U, int NR, int MV, class X, class W>
int run_all(const Problem& p, const X* x, int64_t ldx, X* y, int64_t ldy) {
  static thread_local Scratch packed_w;
  const int64_t units = p.block / U::per_unit;
  const Plan plan = make_plan(p, units, MV * L);
  float* w = packed_w.floats(plan.most_blocks * units * p.block + 64);
  if (!w) return MST_NO_MEMORY;
  Tickets tickets;
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(p.threads)
  if (!work<U, NR, MV, X, W>(p, plan, tickets, w, x, ldx, y, ldy)) failed = true;
  packed_w.trim();
  return failed ? MST_NO_MEMORY : MST_OK;
}

template <class X, class W> int dispatch(const Problem& p, const void* x, int64_t ldx, void* y, int64_t ldy) {
  using U = typename UnitOf<X>::type;
  const X* from = static_cast<const X*>(x);
  X* to = static_cast<X*>(y);
  if (p.block == 4) return run_all<U, 4, narrow_vectors, X, W>(p, from, ldx, to, ldy);
  return run_all<U, wide_outputs, wide_vectors, X, W>(p, from, ldx, to, ldy);
}

}  // namespace
}  // namespace mst

using namespace mst;

MST_API int mst_spmm(int x_dtype, int w_dtype, int block, const void* x, int64_t ldx, const void* w, int64_t ldw,
                     int64_t rows, int64_t cols, const int32_t* index, int outputs_are_rows, const void* bias,
                     int bias_dtype, void* y, int64_t ldy, int64_t m, int threads) {
  if (block != 4 && block != 8 && block != 16 && block != 32 && block != 64) return MST_BAD_BLOCK;
  if (m <= 0) return MST_OK;
  const int64_t R = ceil_div(rows, block), C = ceil_div(cols, block);
  Problem p;
  p.block = block;
  p.outputs = outputs_are_rows ? rows : cols;
  p.reduction = outputs_are_rows ? cols : rows;
  p.out_blocks = outputs_are_rows ? R : C;
  p.red_blocks = outputs_are_rows ? C : R;
  p.lists = outputs_are_rows ? by_rows(index, R) : by_cols(index, R, C);
  p.w = w;
  p.ldw = ldw;
  p.outputs_are_rows = outputs_are_rows;
  p.m = m;
  p.threads = threads < 1 ? 1 : threads;
  std::vector<float> padded(p.out_blocks * block, 0.0f);
  const auto* wide = static_cast<const float*>(bias);
  const auto* narrow = static_cast<const bf16*>(bias);
  for (int64_t o = 0; bias && o < p.outputs; o++)
    padded[o] = bias_dtype == MST_F32 ? wide[o] : to_float(narrow[o]);
  p.bias = padded.data();
  if (x_dtype == MST_F32 && w_dtype == MST_F32) return dispatch<float, float>(p, x, ldx, y, ldy);
  if (x_dtype == MST_BF16 && w_dtype == MST_BF16) return dispatch<bf16, bf16>(p, x, ldx, y, ldy);
  if (x_dtype == MST_BF16 && w_dtype == MST_F32) return dispatch<bf16, float>(p, x, ldx, y, ldy);
  return MST_BAD_DTYPE;
}
