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
// With bf16 dot products a unit of the reduction is two elements: the columns of a block of 2, which x^T has side by side.
// Blocks of 1 have theirs anywhere, so two of a list are joined in registers, token by token, out of lines that hold two
// tokens a lane: a shuffle for every dot product, and still a load for two multiply-adds a lane instead of one.
//
// See fine.h for what bounds it.
#include "fine.h"
#include "spmm_plan.h"

namespace mst {
namespace {

// Outputs written to y together. In bf16 32 bytes of a row are, not 16: it takes no more shuffles, and 4 % less time with
// blocks of 2 (1 % with blocks of 1).
#if defined(MST_BF16_PAIRS)
template <class Y> constexpr int outputs_at_once = std::is_same_v<Y, bf16> ? 16 : 8;
#else
template <class Y> constexpr int outputs_at_once = 8;
#endif

// How an active block is multiplied: U and B, or halves of units.
template <class U, int B> struct Shape {
  static constexpr bool halves = U::per_unit > B;                // two blocks of a list make a unit
  static constexpr int units = halves ? 1 : B / U::per_unit;     // lines of x^T per reduction block
  static constexpr int parts = halves ? 2 : 1;                   // vectors of sums per vector of a line
  static constexpr int vectors = fine_vectors / parts;           // of a line
  static constexpr int64_t x_floats = units * vectors * L;       // of a tile of x^T per reduction block
  static constexpr int64_t w_floats = halves ? 1 : units * B;    // of a packed block
};

// ---- the tile ------------------------------------------------------------------------------------------------------

template <class U, int B, int MV>
MST_INLINE void add_block(const float* x, const typename U::element* w, vf (&acc)[B][MV]) {
  MST_UNROLL for (int k = 0; k < Shape<U, B>::units; k++) {
    vf a[B];
    MST_UNROLL for (int r = 0; r < B; r++) {
      float unit;
      memcpy(&unit, w + (k * B + r) * U::per_unit, 4);
      a[r] = broadcast(unit);
    }
    MST_UNROLL for (int v = 0; v < MV; v++) {
      const vf b = load(x + (k * MV + v) * L);
      MST_UNROLL for (int r = 0; r < B; r++) acc[r][v] = U::multiply_add(a[r], b, acc[r][v]);
    }
  }
}

// x: the tile's x^T shifted so that block idx[q] starts at idx[q] * units lines. Adds to the sums, or to the bias if
// given.
template <class U, int B, int MV>
MST_NOINLINE void tile(const float* x, const typename U::element* w, const int32_t* idx, int64_t n, const float* bias,
                       float* sums) {
  // Enough independent accumulators to hide the latency.
  constexpr int sets = B == 1 || U::per_unit == 2 ? 2 : 1;
  constexpr int64_t stride = Shape<U, B>::units * MV * L;
  vf acc[sets][B][MV];
  MST_UNROLL for (int r = 0; r < B; r++)
    MST_UNROLL for (int v = 0; v < MV; v++) {
      acc[0][r][v] = bias ? broadcast(bias[r]) : load(sums + (r * MV + v) * L);
      if (sets == 2) acc[sets - 1][r][v] = vf{};
    }
  int64_t q = 0;
  for (; q + sets <= n; q += sets)
    MST_UNROLL for (int s = 0; s < sets; s++)
      add_block<U, B, MV>(x + idx[q + s] * stride, w + (q + s) * B * B, acc[s]);
  if (q < n) add_block<U, B, MV>(x + idx[q] * stride, w + q * B * B, acc[0]);
  MST_UNROLL for (int r = 0; r < B; r++)
    MST_UNROLL for (int v = 0; v < MV; v++)
      store(sums + (r * MV + v) * L, sets == 2 ? acc[0][r][v] + acc[sets - 1][r][v] : acc[0][r][v]);
}

#if defined(MST_BF16_PAIRS)
// Lines of two blocks, joined, with the weights of both. Of each vector of lines: the tokens in its low 8 bytes of 16, and
// those in the high ones.
template <int MV> MST_INLINE void add_two(const float* x0, const float* x1, float w, vf (&acc)[2 * MV]) {
  const vf a = broadcast(w);
  MST_UNROLL for (int v = 0; v < MV; v++) {
    __m512i b0 = (__m512i)load(x0 + v * L), b1 = (__m512i)load(x1 + v * L);
    asm("" : "+v"(b0), "+v"(b1));  // or compilers load both again for the other half
    acc[2 * v] = Bf16Pair::multiply_add(a, (vf)_mm512_unpacklo_epi16(b0, b1), acc[2 * v]);
    acc[2 * v + 1] = Bf16Pair::multiply_add(a, (vf)_mm512_unpackhi_epi16(b0, b1), acc[2 * v + 1]);
  }
}

// As `tile`, for halves of units. A last block without another one is joined with zeros, which no x can make a NaN of.
template <int MV>
MST_NOINLINE void tile_of_halves(const float* x, const bf16* w, const int32_t* idx, int64_t n, const float* bias,
                                 float* sums) {
  constexpr int64_t stride = MV * L;
  vf acc[2][2 * MV];
  MST_UNROLL for (int v = 0; v < 2 * MV; v++) {
    acc[0][v] = bias ? broadcast(*bias) : load(sums + v * L);
    acc[1][v] = vf{};
  }
  float two[2];
  int64_t q = 0;
  for (; q + 4 <= n; q += 4) {
    memcpy(two, w + q, 8);
    MST_UNROLL for (int s = 0; s < 2; s++)
      add_two<MV>(x + idx[q + 2 * s] * stride, x + idx[q + 2 * s + 1] * stride, two[s], acc[s]);
  }
  if (q + 2 <= n) {
    memcpy(two, w + q, 4);
    add_two<MV>(x + idx[q] * stride, x + idx[q + 1] * stride, two[0], acc[0]);
    q += 2;
  }
  if (q < n) {
    alignas(64) static constexpr float zeros[MV * L] = {};
    const bf16 last[2] = {w[q], bf16{0}};
    memcpy(two, last, 4);
    add_two<MV>(x + idx[q] * stride, zeros, two[0], acc[1]);
  }
  MST_UNROLL for (int v = 0; v < 2 * MV; v++) store(sums + v * L, acc[0][v] + acc[1][v]);
}
#endif

// A vector of an output's sums as L tokens next to each other.
template <bool halves> MST_INLINE vf next_tokens(const float* sums, [[maybe_unused]] int v) {
#if defined(MST_BF16_PAIRS)
  if constexpr (halves) {
    const __m512 low = (__m512)load(sums + v / 2 * 2 * L), high = (__m512)load(sums + (v / 2 * 2 + 1) * L);
    return v % 2 ? (vf)_mm512_shuffle_ps(low, high, 0xdd) : (vf)_mm512_shuffle_ps(low, high, 0x88);
  }
#endif
  return load(sums + v * L);
}

// The sums of `outputs` outputs, MV vectors each, to y.
template <bool halves, int MV, class Y>
void write_outputs(const float* sums, int64_t outputs, int tokens, Y* y, int64_t ldy) {
  constexpr int N = outputs_at_once<Y>;
  for (int v = 0; v * L < tokens; v++)  // a few rows of y at a time: many may lie in one set of the cache
    for (int64_t o = 0; o < outputs; o += N) {
      vf acc[N][1];
      MST_UNROLL for (int r = 0; r < N; r++) acc[r][0] = next_tokens<halves>(sums + (o + r) * MV * L, v);
      store_tile<N, 1>(acc, y + v * L * ldy + o, ldy, static_cast<int>(std::min<int64_t>(N, outputs - o)),
                       tokens - v * L);
    }
}

// ---- the loops -----------------------------------------------------------------------------------------------------

template <class U, int B, class X, class W> struct Kernel {
  using S = Shape<U, B>;
  using E = typename U::element;
  static constexpr int64_t MT = fine_floats, span = line_lists, pack_rows = span;
  const Problem& p;
  const int64_t chunk, chunks, group;  // reduction blocks of a chunk, output blocks of a group
  const Plan plan;
  const X* x;
  int64_t ldx;
  X* y;
  int64_t ldy;

  Kernel(const Problem& problem, const MstSpmm& a)
      : p(problem), chunk(fine_chunk<U>(B, S::x_floats, p.out_blocks, p.red_blocks, p.lists.ptr[p.out_blocks])),
        chunks(ceil_div(p.red_blocks, chunk)), group(chunks > 1 ? fine_group(B * MT) : span),
        plan(make_plan(p, S::w_floats, MT, tile_floats(), p.red_blocks, fine_tiles * tile_floats() * 4, false)),
        x(static_cast<const X*>(a.x)), ldx(a.ldx), y(static_cast<X*>(a.y)), ldy(a.ldy) {}

  int64_t tile_floats() const { return (p.red_blocks * S::units + S::parts * L) * S::vectors * L; }

  // A packed line: where each output block's share of each chunk begins, the blocks' places, their weights.
  struct Line {
    int32_t *cuts, *idx;
    E* w;
  };
  int64_t cuts_floats() const { return chunks * span + 1; }
  int64_t packed_floats(int64_t begin, int64_t end) const {
    return (p.lists.ptr[end] - p.lists.ptr[begin]) * (1 + S::w_floats) + ceil_div(end - begin, span) * cuts_floats();
  }
  Line line(const Piece& piece, int64_t i0, int64_t i1) const {
    auto* cuts = reinterpret_cast<int32_t*>(piece.w + packed_floats(piece.begin, i0));
    int32_t* idx = cuts + cuts_floats();
    return {cuts, idx, reinterpret_cast<E*>(idx + p.lists.ptr[i1] - p.lists.ptr[i0])};
  }

  // The weights of one block, [unit][output][element of the unit]; zero beyond the edges of W.
  MST_INLINE void pack_block(const W* w, int64_t by_output, int64_t by_input, int64_t output, int64_t input, E* to) const {
    constexpr int next = S::halves ? 1 : U::per_unit;  // elements of the reduction that lie side by side
    const W* from = w + output * by_output + input * by_input;
    const bool whole = B == 1 || (output + B <= p.outputs && input + B <= p.reduction);
    MST_UNROLL for (int k = 0; k < B; k += next)
      MST_UNROLL for (int r = 0; r < B; r++)
        MST_UNROLL for (int j = 0; j < next; j++, to++) {
          if (!whole && (input + k + j >= p.reduction || output + r >= p.outputs)) {
            from_float(0.0f, to);
            continue;
          }
          const W& element = from[r * by_output + (k + j) * by_input];
          if constexpr (std::is_same_v<E, W> && std::is_same_v<X, W>)
            *to = element;
          else
            from_float(rounded<X>(element), to);
        }
  }

  template <bool outputs_are_rows> void pack_line(const Piece& piece, int64_t i0, int64_t i1) const {
    const W* w = static_cast<const W*>(p.w);
    const int64_t by_output = outputs_are_rows ? p.ldw : 1, by_input = outputs_are_rows ? 1 : p.ldw;
    Line to = line(piece, i0, i1);
    const auto list = [&](int64_t i) { return std::pair<int64_t, int64_t>(p.lists.ptr[i], p.lists.ptr[i + 1]); };
    arrange_line(p.lists.idx, i0, i1, 0, chunk, chunks, list, to.cuts, [&](int64_t i, int64_t q) {
      const int32_t j = p.lists.idx[q];
      *to.idx++ = j;
      pack_block(w, by_output, by_input, i * B, static_cast<int64_t>(j) * B, to.w);
      to.w += B * B;
    });
  }
  void pack(const Piece& piece, int64_t i0, int64_t i1) const {
    return p.outputs_are_rows ? pack_line<true>(piece, i0, i1) : pack_line<false>(piece, i0, i1);
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
    for (int64_t k = 0; k < i1 - i0; k++) {
      const E* w = from.w + cuts[k] * B * B;
      const int32_t* idx = from.idx + cuts[k];
      const float* bias = c == 0 ? p.bias + (i0 + k) * B : nullptr;
      float* own = sums + k * B * MV * S::parts * L;
#if defined(MST_BF16_PAIRS)
      if constexpr (S::halves)
        tile_of_halves<MV>(xt, w, idx, cuts[k + 1] - cuts[k], bias, own);
      else
#endif
        tile<U, B, MV>(xt, w, idx, cuts[k + 1] - cuts[k], bias, own);
    }
    const int64_t outputs = std::min(p.outputs, i1 * B) - i0 * B;
    if (last) write_outputs<S::halves, MV * S::parts>(sums, outputs, tokens, to + i0 * B, ldy);
  }

  template <int MV> void pack_x(int64_t t, float* to) const {
    const X* from = x + t * MT * ldx;
    const int64_t tokens = std::min(MT, p.m - t * MT), units = p.red_blocks * S::units;
    if constexpr (S::halves)
      pack_lines<MV>(from, ldx, tokens, p.reduction, 0, units, to);
    else
      pack_tile<U, MV>(from, ldx, tokens, p.reduction, 0, units, to);
  }

  void panel(const Piece& piece, int64_t t0, int64_t t1, int64_t o0, int64_t o1, float* scratch) const {
    const auto whole_lines = [&](int64_t o) {
      return std::min(piece.end, piece.begin + ceil_div(o - piece.begin, span) * span);
    };
    o0 = whole_lines(o0), o1 = whole_lines(o1);
    const auto xt = [&](int64_t t) { return scratch + (t - t0) * plan.tile_size; };
    float* sums = scratch + plan.panel_tiles() * plan.tile_size;
    for (int64_t t = t0; t < t1; t++)
      by_vectors(t, [&](auto mv) { pack_x<mv>(t, xt(t)); });
    for (int64_t g = o0; g < o1; g += group)
      for (int64_t c = 0; c < chunks; c++)
        for (int64_t i = g; i < std::min(o1, g + group); i += span)
          for (int64_t t = t0; t < t1; t++)
            by_vectors(t, [&](auto mv) {
              run_line<mv>(piece, i, std::min(o1, i + span), c, xt(t), sums + ((t - t0) * group + i - g) * B * MT,
                           y + t * MT * ldy, static_cast<int>(std::min(MT, p.m - t * MT)));
            });
  }

  // The vectors of a line that hold the tokens of a tile.
  template <class Body> void by_vectors(int64_t t, Body body) const {
    constexpr int64_t each = S::parts * L;
    const int64_t tokens = p.m - t * MT;
    if constexpr (S::vectors > 2)
      if (tokens > 2 * each) return body(std::integral_constant<int, S::vectors>{});
    if (tokens > each) return body(std::integral_constant<int, 2>{});
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
      using U = typename UnitOf<X>::type;
      return a.block == 1 ? run_steps(Kernel<U, 1, X, W>(p, a)) : run_steps(Kernel<U, 2, X, W>(p, a));
    });
  });
  return status;
}

}  // namespace mst
