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
//             write y once, transposed in registers, bias included; by way of a stage where that takes small pieces
//
// Intensity: NR * MV multiply-adds for NR + MV loads, 24 for 11 with AVX-512 (32 registers: 8 x 3; 4 x 6 for blocks of
// 4) and 8 for 6 with 16 registers. There 4 x 3 would be 12 for 7 and fill all of them: compilers then spill sums within
// the loop, or load x^T once more for each multiply-add, and two thirds of the speed are left. W comes from L1, where it
// is reused by each tile of a panel, x^T from L2, y goes out once. Nothing depends on the block size but the length of
// the innermost loop, so fine blocks cost little.
//
// Tokens are cut into even tiles: a tile of one vector has too few sums to hide how long a multiply-add takes, so that
// 64 tokens are 32 + 32 and not 48 + 16, and 80 are 48 + 32, without a third vector of nothing. Few tiles are as many
// as a multiple of the threads. Expected was .89 of the time for 64 and 128 tokens by counting multiply-adds, measured
// (one thread of a Zen 5, bf16, 768 x 768, density .2) .92 to .99 and .90 to .95 with blocks of 8 and 32, .86 and .82
// to .87 with blocks of 4, .83 to .92 for 80; from 512 on .97 to 1.01.
//
// Rows of y that stand a multiple of 4096 bytes apart share a set of the L1 cache, and what is written to the tokens of a
// tile in pieces of 8 or 16 bytes misses it each time. Such pieces are collected in a stage of 32 outputs or more, and
// copied from there: with rows of 12288 bytes grad-input takes .4 to .5 of the time at blocks of 4, .73 to .88 in bf16 at
// wider ones (density .1, Zen 5). Where rows do not collide (768 bf16: 8 sets hold the lines of a tile's 48 tokens) the
// stage costs 4 to 10 % at blocks of 8 and 32, so that such pieces go to y. Pieces of 32 bytes (float, 8 outputs)
// gain nothing, and lose a tenth where rows do not collide, so they go to y; so do all where vectors are shorter, whose
// tiles have fewer tokens.
#include <numeric>

#include "spmm_plan.h"

namespace mst {
namespace {

constexpr int wide_outputs = L == 16 ? 8 : 4, wide_vectors = L == 16 ? 3 : 2, narrow_vectors = L == 16 ? 6 : 2;
constexpr int64_t panel_bytes = 200 << 10;  // of x^T, if that holds a tile: stays in L2 beside W and y
constexpr int64_t cache_sets = 64, cache_ways = 8;  // of L1, at least: lines 4096 bytes apart share a set
constexpr int64_t chunk_bytes = 640 << 10;  // one tile of x^T; a longer reduction is cut

// ---- the tile ------------------------------------------------------------------------------------------------------

// Where the accumulators of a tile start and end: bias or earlier partial sums in, partial sums or results out.
template <class Y> struct TileEnds {
  const float* bias;
  const float* partial_in;  // [NR][MV * L] or null
  float* partial_out;       // or null: write results
  Y* to;                    // the results' place for the first token, in the stage or in y
  int64_t apart;            // of tokens there
};

template <int NR, int MV, class Y> MST_INLINE void finish(const vf (&acc)[NR][MV], const TileEnds<Y>& e) {
  if (e.partial_out) {
    MST_UNROLL for (int r = 0; r < NR; r++)
      MST_UNROLL for (int v = 0; v < MV; v++) store(e.partial_out + (r * MV + v) * L, acc[r][v]);
    return;
  }
  store_tile<NR, MV>(acc, e.to, e.apart, NR, MV * L);
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

template <class U, int NR, int MV, class X, class W> struct Kernel {
  static constexpr int64_t MT = MV * L, pack_rows = 4;
  static constexpr bool small_pieces = L == 16 && NR * sizeof(X) < 32;
  const Problem& p;
  const Plan plan;
  const X* x;
  int64_t ldx;
  X* y;
  int64_t ldy;
  const bool staged;  // y of whole tiles too

  Kernel(const Problem& problem, const MstSpmm& a)
      : p(problem),
        plan(make_plan(p, units() * p.block, MT, (chunk() * units() + L) * MT, chunk(), panel_bytes, true)),
        x(static_cast<const X*>(a.x)), ldx(a.ldx), y(static_cast<X*>(a.y)), ldy(a.ldy),
        staged(small_pieces && rows_collide(a.ldy * static_cast<int64_t>(sizeof(X)))) {}

  // Whether a tile's rows of y, so many bytes apart, have more lines in a set of the cache than it holds.
  static bool rows_collide(int64_t bytes) {
    if (bytes % 64) return false;  // they drift through the sets
    return cache_sets / std::gcd(bytes / 64, cache_sets) * cache_ways < MT;
  }
  int64_t units() const { return p.block / U::per_unit; }
  int64_t chunk() const {
    const int64_t tile_row = MT * 4 * units();  // bytes of x^T per reduction block
    if (p.red_blocks * tile_row <= chunk_bytes) return p.red_blocks;
    return std::max<int64_t>(L, chunk_bytes / tile_row / L * L);
  }
  int64_t packed_floats(int64_t begin, int64_t end) const {
    return (p.lists.ptr[end] - p.lists.ptr[begin]) * units() * p.block;
  }
  int64_t scratch_floats(const Piece& piece) const {
    const int64_t partial = plan.chunk < p.red_blocks ? (piece.end - piece.begin) * p.block * MT : 0;
    return stage_floats() + plan.panel_tiles() * (plan.tile_size + partial);
  }
  // The stage: outputs of whole blocks for each token of a tile.
  int64_t stage_width() const { return std::max(line_outputs, p.block); }
  int64_t stage_floats() const { return MT * stage_width() * sizeof(X) / 4; }
  void pack(const Piece& piece, int64_t i0, int64_t i1) const {
    for (int64_t i = i0; i < i1; i++)
      pack_output_block<U, NR, X, W>(p, i, piece.w + (p.lists.ptr[i] - piece.w_base) * units() * p.block);
  }

  // The first token of a tile: all have about as many vectors.
  int64_t begin(int64_t t) const {
    return t == plan.tiles ? p.m : ceil_div(p.m, static_cast<int64_t>(L)) * t / plan.tiles * L;
  }
  // Calls body with the vectors that a tile is computed with.
  template <class Body> void by_vectors(int64_t t, Body body) const {
    const int64_t vectors = ceil_div(begin(t + 1) - begin(t), static_cast<int64_t>(L));
    if (vectors == 1) return body(std::integral_constant<int, 1>{});
    if constexpr (MV > 2)
      if (vectors == 2) return body(std::integral_constant<int, 2>{});
    if constexpr (MV > 4)
      if (vectors <= 4) return body(std::integral_constant<int, 4>{});
    body(std::integral_constant<int, MV>{});
  }

  // One chunk of the reduction for one tile of V vectors: all outputs of block i.
  template <int V>
  void run_tile(const Piece& piece, int64_t i, const float* xt, int64_t c0, int64_t c1, float* partial, X* to,
                int64_t apart) const {
    const int B = p.block, units = static_cast<int>(this->units());
    const int32_t* idx = p.lists.idx;
    const int64_t first = p.lists.ptr[i], last = p.lists.ptr[i + 1];
    int64_t q0 = first, q1 = last;
    if (c0 > 0) q0 = std::lower_bound(idx + first, idx + last, static_cast<int32_t>(c0)) - idx;
    if (c1 < p.red_blocks) q1 = std::lower_bound(idx + first, idx + last, static_cast<int32_t>(c1)) - idx;
    const float* w = piece.w + (first - piece.w_base) * B * units;
    const float* from = xt - c0 * units * V * L;
    for (int g = 0; g < B / NR; g++) {
      const int64_t o = i * B + g * NR;
      if (o >= p.outputs) break;
      float* sums = partial ? partial + (o - piece.begin * B) * V * L : nullptr;
      const TileEnds<X> ends{p.bias + o, c0 > 0 ? sums : nullptr, c1 < p.red_blocks ? sums : nullptr, to + g * NR,
                             apart};
      const float* wg = w + (g * (last - first) + q0 - first) * units * NR;
      if (units % 4 == 0)
        tile<U, NR, V, 4>(from, wg, idx + q0, q1 - q0, units, ends);
      else
        tile<U, NR, V, 2>(from, wg, idx + q0, q1 - q0, units, ends);
    }
  }

  // One chunk of the reduction for one tile: blocks [i, end) of outputs, at most a stage of them, and their rows of y.
  template <int V>
  void run_outputs(const Piece& piece, int64_t i, int64_t end, const float* xt, int64_t c0, int64_t c1, float* partial,
                   X* stage, X* rows, int64_t tokens) const {
    const int64_t first = i * p.block, outs = std::min((end - i) * p.block, p.outputs - first), bytes = outs * sizeof(X);
    const bool last = c1 == p.red_blocks, whole = tokens == V * L && outs == (end - i) * p.block;
    const bool direct = whole && !staged;
    X* to = direct ? rows + first : stage;
    const int64_t apart = direct ? ldy : stage_width();
    if (last)  // the lines of y arrive while the results are computed
      for (int64_t t = 0; t < tokens; t++)
        for (int64_t at = 0; at < bytes; at += 64)
          __builtin_prefetch(reinterpret_cast<const char*>(rows + t * ldy + first) + at, 1, 3);
    for (int64_t j = i; j < end; j++) run_tile<V>(piece, j, xt, c0, c1, partial, to + (j - i) * p.block, apart);
    if (last && !direct)
      for (int64_t t = 0; t < tokens; t++) copy_row(stage + t * apart, rows + t * ldy + first, bytes);
  }

  void panel(const Piece& piece, int64_t t0, int64_t t1, int64_t o0, int64_t o1, float* scratch) const {
    const int64_t outs = (piece.end - piece.begin) * p.block;
    X* stage = reinterpret_cast<X*>(scratch);
    scratch += stage_floats();
    float* partial = plan.chunk < p.red_blocks ? scratch + plan.panel_tiles() * plan.tile_size : nullptr;
    for (int64_t c0 = 0; c0 < p.red_blocks; c0 += plan.chunk) {
      const int64_t c1 = std::min(p.red_blocks, c0 + plan.chunk), k0 = c0 * p.block, n = (c1 - c0) * units();
      for (int64_t t = t0; t < t1; t++) {
        float* to = scratch + (t - t0) * plan.tile_size;
        by_vectors(t, [&](auto mv) {
          pack_tile<U, mv>(x + begin(t) * ldx, ldx, begin(t + 1) - begin(t), p.reduction, k0, n, to);
        });
      }
      const int64_t span = std::max(1, line_outputs / p.block);
      for (int64_t i = o0; i < o1; i += span)
        for (int64_t t = t0; t < t1; t++) {
          const int64_t end = std::min(o1, i + span);
          float* sums = partial ? partial + (t - t0) * outs * MT : nullptr;
          const float* xt = scratch + (t - t0) * plan.tile_size;
          by_vectors(t, [&](auto mv) {
            run_outputs<mv>(piece, i, end, xt, c0, c1, sums, stage, y + begin(t) * ldy, begin(t + 1) - begin(t));
          });
        }
    }
  }
};

template <class X, class W> int run(const Problem& p, const MstSpmm& a) {
  using U = typename UnitOf<X>::type;
  if (p.block == 4) return run_steps(Kernel<U, 4, narrow_vectors, X, W>(p, a));
  return run_steps(Kernel<U, wide_outputs, wide_vectors, X, W>(p, a));
}

}  // namespace
}  // namespace mst

using namespace mst;

MST_API int mst_spmm(const MstSpmm* arguments) {
  const MstSpmm& a = *arguments;
  const int known = by_block(a.block, [](auto) { return MST_OK; });
  if (known != MST_OK || a.m <= 0) return known;
  if (a.block < 4) return spmm_fine(a);
  if (a.m <= few_tokens(a)) return spmm_few(a);
  int status = MST_NO_MEMORY;
  within_memory([&] {
    status = by_product(a.x_dtype, a.w_dtype, [&](auto x, auto w) {
      return run<typename decltype(x)::type, typename decltype(w)::type>(Problem(a), a);
    });
  });
  return status;
}
