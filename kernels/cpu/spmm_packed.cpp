// y = x . W^T + bias, for inference, with a W whose active blocks were packed once, alone and in the order of reading:
//
//     [output block][strip of NR outputs][active block][pair of the reduction][NR outputs][2]      NR = min(block, 8)
//
// so that all of W is one sequence, of density times its size, whatever the block. Numbers of a pair are neighbours of
// the reduction, what a bf16 dot product takes; blocks of 1 have no pairs. Every dtype is laid out alike.
//
// Loop nest, SIMD over tokens:
//
//     for each slab of tokens, whose x^T is kept:
//       transpose x to [tile][reduction][MV vectors of tokens]        all threads; then, when all of it is there:
//       for each panel of tiles (what stays in L2), part of the outputs (threads, dynamic):
//         for each line of output blocks, 32 outputs or more:         its W comes from memory once, then from L1 or L2
//           for each tile, output block, strip:
//             NR x MV vector accumulators, across ALL active blocks of the output block:
//               for each active block, pair:  loads of x^T, broadcasts of W, NR * MV multiply-adds each
//             sums of the line's outputs, in L1
//           write y, transposed in registers
//
// Up to 16 tokens are one vector: a broadcast and a multiply-add for each unit of W, 8 or 16 to a line of the cache, which
// take 4 to 8 cycles on two ports where two threads get such a line from memory in some 20. No lane is ever added to
// another one, so short lists cost nothing. Tokens are cut into tiles of as many vectors each, and threads into the
// outputs, not into the tokens, so that 64 tokens are no tile of 48 and one of 16. Up to four tokens have kernels of their
// own (packed_few.h), or are one vector of four lanes: in blocks of 1 and 2, and, of bf16 in pairs, three and four in
// blocks of 4.
#include "packed_few.h"

namespace mst {
namespace {

constexpr int64_t slab_bytes = 8 << 20;         // of x^T
constexpr int64_t panel_bytes = 400 << 10;      // of x^T, if that holds a tile: stays in L2 beside a line of W
constexpr int64_t pack_units = 512;             // of a tile's x^T that are transposed at a time
constexpr int64_t parts_a_thread = 6;           // of the outputs
constexpr int64_t work_a_thread = 16 << 10;     // multiply-adds that are worth waking a thread for

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// Numbers as floats, one at a time: `rows` of x^T for `numbers` of the reduction.
template <class E, int P> struct Widened {
  using Unit = F32;
  static constexpr int rows = P;
  static MST_INLINE float weight(const E* w, int r, int j) { return to_float(w[P * r + j]); }
  template <class V> static MST_INLINE V multiply_add(float a, V b, V c) { return (a - V{}) * b + c; }
};

#if defined(MST_BF16_PAIRS)
// Or pairs of bf16.
struct Dotted {
  using Unit = Bf16Pair;
  static constexpr int rows = 1;
  static MST_INLINE float weight(const bf16* w, int r, int) {
    float pair;
    memcpy(&pair, w + 2 * r, 4);
    return pair;
  }
  static MST_INLINE vf multiply_add(float a, vf b, vf c) { return Bf16Pair::multiply_add(broadcast_bits(a), b, c); }
  static MST_INLINE v4f multiply_add(float a, v4f b, v4f c) {
    return (v4f)_mm_dpbf16_ps((__m128)c, (__m128bh)_mm_set1_ps(a), (__m128bh)(__m128)b);
  }

 private:
  // Not a float's broadcast: a sum with 0 would make another NaN of some pairs.
  static MST_INLINE vf broadcast_bits(float a) { return (vf)_mm512_set1_ps(a); }
};
template <class E, int P>
using Arithmetic = std::conditional_t<std::is_same_v<E, bf16> && P == 2, Dotted, Widened<E, P>>;
#else
template <class E, int P> using Arithmetic = Widened<E, P>;
#endif

// ---- the product of a strip ----------------------------------------------------------------------------------------

// What a kernel is made for: elements, outputs of a strip, numbers of the reduction that lie together.
template <class Element, int Strip> struct Form {
  using E = Element;
  static constexpr int NR = Strip, P = Strip > 1 ? 2 : 1;
  using A = Arithmetic<E, P>;
  using U = typename A::Unit;
  static constexpr int pair_numbers = NR * P;  // of W
  // Outputs at once, and vectors of tokens: 24 accumulators with 32 registers, 8 with 16. See spmm.cpp.
  static constexpr int few = few_packed_tokens<E, NR>();  // up to how many tokens there are kernels of their own
  static constexpr int R = L == 16 ? NR : std::min(NR, 4), most_vectors = L < 16 ? 2 : NR == 8 ? 3 : 4;
};

// sums[r][MV * N] of outputs [r0, r0 + F::R) of a strip; x: x^T of the tile, w: the strip's first block.
template <class F, int MV, int N>
MST_NOINLINE void strip(const float* x, const typename F::E* w, const int32_t* idx, int64_t n, int pairs, int r0,
                        const float* bias, float* sums) {
  using A = typename F::A;
  using V = typename Floats<N>::type;
  constexpr int R = F::R, sets = R * MV >= 8 ? 1 : 8 / (R * MV);  // of accumulators: 8 hide a multiply-add's latency
  constexpr int at_once = F::NR >= 8 ? 4 : F::NR >= 2 ? F::NR / 2 : 1;  // pairs; of blocks of up to 8 all
  V acc[sets][R][MV];
  MST_UNROLL for (int s = 0; s < sets; s++)
    MST_UNROLL for (int r = 0; r < R; r++)
      MST_UNROLL for (int v = 0; v < MV; v++) acc[s][r][v] = s == 0 ? bias[r] - V{} : V{};
  const int64_t block_floats = static_cast<int64_t>(pairs) * A::rows * MV * N, block_numbers = pairs * F::pair_numbers;
  const auto block = [&](int64_t q, V(&to)[R][MV]) __attribute__((always_inline)) {
    const float* xk = x + idx[q] * block_floats;
    const typename F::E* wk = w + q * block_numbers + F::P * r0;
#pragma GCC unroll 1
    for (int k = 0; k < pairs; k += at_once) {
      MST_UNROLL for (int u = 0; u < at_once; u++) {
        if ((u * F::pair_numbers * sizeof(*w)) % 64 == 0)
          __builtin_prefetch(reinterpret_cast<const char*>(wk + u * F::pair_numbers) + packed_ahead, 0, 3);
        MST_UNROLL for (int j = 0; j < A::rows; j++) {
          V b[MV];
          MST_UNROLL for (int v = 0; v < MV; v++) b[v] = load_n<N>(xk + ((u * A::rows + j) * MV + v) * N);
          MST_UNROLL for (int r = 0; r < R; r++) {
            const float a = A::weight(wk + u * F::pair_numbers, r, j);
            MST_UNROLL for (int v = 0; v < MV; v++) to[r][v] = A::multiply_add(a, b[v], to[r][v]);
          }
        }
      }
      xk += at_once * A::rows * MV * N;
      wk += at_once * F::pair_numbers;
    }
  };
  int64_t q = 0;
  for (; q + sets <= n; q += sets)
    MST_UNROLL for (int s = 0; s < sets; s++) block(q + s, acc[s]);
  for (; q < n; q++) block(q, acc[0]);
  MST_UNROLL for (int r = 0; r < R; r++)
    MST_UNROLL for (int v = 0; v < MV; v++) {
      V sum = acc[0][r][v];
      MST_UNROLL for (int s = 1; s < sets; s++) sum += acc[s][r][v];
      store_n<N>(sums + (r * MV + v) * N, sum);
    }
}

// ---- tokens --------------------------------------------------------------------------------------------------------

// As pack_tile, to vectors of four tokens, for units [k0, k0 + units).
template <class U, class X>
void pack_four(const X* x, int64_t ldx, int64_t tokens, int64_t reduction, int64_t k0, int64_t units, float* xt) {
  constexpr int step = 4 * U::per_unit;
  const auto units_at = [](const X* at) {
    if constexpr (U::per_unit == 1) return load4(at);
    return load4(reinterpret_cast<const float*>(at));
  };
  for (int64_t k = 0; k < units; k += 4) {
    const int64_t first = k0 + k * U::per_unit, left = std::clamp<int64_t>(reduction - first, 0, step);
    v4f row[4];
    for (int t = 0; t < 4; t++) {
      const X* from = x + std::min<int64_t>(t, tokens - 1) * ldx + first;
      X edge[step] = {};
      if (left < step) memcpy(static_cast<void*>(edge), from, left * sizeof(X)), from = edge;
      row[t] = units_at(from);
    }
    transpose4(row[0], row[1], row[2], row[3]);
    for (int i = 0; i < 4; i++) store4(xt + (k + i) * 4, row[i]);
  }
}

// ---- writing y -----------------------------------------------------------------------------------------------------

// y of a line's outputs for the L tokens of vector v of a tile with MV; sums: [output][MV * L].
template <int MV, class X>
void write_vector(const float* sums, int v, int64_t outputs, int64_t tokens, X* y, int64_t ldy, X* stage) {
  constexpr int64_t width = 8;
  const int64_t whole = tokens == L && sizeof(X) == 4 ? outputs / width * width : 0;  // small pieces miss the cache
  const auto write = [&](int64_t o, X* to, int64_t apart) __attribute__((always_inline)) {
    vf acc[width];
    MST_UNROLL for (int r = 0; r < width; r++) acc[r] = load(sums + ((o + r) * MV + v) * L);
    store_transposed<width>(acc, to, apart);
  };
  for (int64_t o = 0; o < whole; o += width) write(o, y + o, ldy);
  const int64_t rest = outputs - whole, apart = ceil_div(rest, width) * width;
  if (!rest) return;
  for (int64_t o = 0; o < rest; o += width) write(whole + o, stage + o, apart);
  for (int64_t t = 0; t < tokens; t++) copy_row(stage + t * apart, y + t * ldy + whole, rest * sizeof(X));
}

// The same of four tokens or fewer; sums: [output][4].
template <class X> void write_four(const float* sums, int64_t outputs, int64_t tokens, X* y, int64_t ldy) {
  for (int64_t o = 0; o < outputs; o += 4) {
    v4f row[4];
    for (int r = 0; r < 4; r++) row[r] = load4(sums + (o + r) * 4);
    transpose4(row[0], row[1], row[2], row[3]);
    const bool whole = o + 4 <= outputs;
    for (int t = 0; t < tokens; t++) {
      X edge[4];
      store4(whole ? y + t * ldy + o : edge, row[t]);
      if (!whole) memcpy(static_cast<void*>(y + t * ldy + o), edge, (outputs - o) * sizeof(X));
    }
  }
}

// ---- the loops -----------------------------------------------------------------------------------------------------

template <class F> struct PackedKernel {
  using X = typename F::E;
  const MstPacked& a;
  const int32_t *ptr, *idx;
  const int64_t out_blocks, units;  // units of x^T
  const int pairs, strips, span;    // of a block; of an output block; output blocks of a line
  const bool four;                  // tokens at most, in one vector of four
  const int64_t vectors, tiles;
  const std::vector<float> bias;
  std::vector<int64_t> slabs, panels;  // tiles
  std::vector<int64_t> cuts;           // output blocks

  explicit PackedKernel(const MstPacked& arguments, int64_t threads)
      : a(arguments), ptr(a.index), idx(ptr + ceil_div(a.outputs, a.block) + 1),
        out_blocks(ceil_div(a.outputs, a.block)),
        units(ceil_div(a.reduction, a.block) * a.block / F::P * F::A::rows), pairs(a.block / F::P),
        strips(a.block / F::NR), span(std::max(1, line_outputs / a.block)), four(a.m > F::few && a.m <= 4),
        vectors(four ? 1 : ceil_div(a.m, L)), tiles(ceil_div(vectors, F::most_vectors)), bias(padded_bias()) {
    slabs = cut_tiles(0, tiles, slab_bytes);
    for (size_t s = 0; s + 1 < slabs.size(); s++)
      for (int64_t t : cut_tiles(slabs[s], slabs[s + 1], panel_bytes))
        if (panels.empty() || t > panels.back()) panels.push_back(t);
    // Parts with as many active blocks each, about, of whole lines.
    const int64_t parts = threads == 1 ? 1 : std::min(ceil_div(out_blocks, span), parts_a_thread * threads);
    cuts = {0};
    for (int64_t part = 1; part < parts; part++) {
      const int64_t wanted = static_cast<int64_t>(ptr[out_blocks]) * part / parts;
      const int64_t at = (std::lower_bound(ptr, ptr + out_blocks, wanted) - ptr) / span * span;
      if (at > cuts.back()) cuts.push_back(at);
    }
    cuts.push_back(out_blocks);
  }

  // Tile t holds the vectors [first_vector(t), first_vector(t + 1)) of tokens.
  int64_t first_vector(int64_t t) const { return t * vectors / tiles; }
  int64_t lanes() const { return four ? 4 : L; }
  const float* at(const float* xt, int64_t slab, int64_t t) const {
    return xt + (first_vector(t) - first_vector(slabs[slab])) * units * lanes();
  }
  int64_t slab_floats() const {
    int64_t most = 0;
    for (size_t s = 0; s + 1 < slabs.size(); s++)
      most = std::max(most, first_vector(slabs[s + 1]) - first_vector(slabs[s]));
    return most * units * lanes() + pack_slack;
  }
  int64_t packs() const { return ceil_div(units, pack_units); }  // of a tile

  // Tiles [t0, t1) cut evenly, so that no run of them takes more than `bytes`, but at least one tile.
  std::vector<int64_t> cut_tiles(int64_t t0, int64_t t1, int64_t bytes) const {
    const int64_t tile = std::min<int64_t>(F::most_vectors, vectors) * units * lanes() * 4, n = t1 - t0;
    const int64_t runs = ceil_div(n, std::max<int64_t>(1, bytes / tile));
    std::vector<int64_t> found;
    for (int64_t run = 0; run <= runs; run++) found.push_back(t0 + run * n / runs);
    return found;
  }

  std::vector<float> padded_bias() const {
    std::vector<float> padded(out_blocks * a.block, 0.0f);
    if (a.bias)
      by_dtype(a.bias_dtype, [&](auto e) {
        const auto* from = static_cast<const typename decltype(e)::type*>(a.bias);
        for (int64_t o = 0; o < a.outputs; o++) padded[o] = to_float(from[o]);
        return MST_OK;
      });
    return padded;
  }

  // Calls body(MV) with the number of vectors of tile t.
  template <class Body> void by_vectors(int64_t t, Body body) const {
    const int64_t n = first_vector(t + 1) - first_vector(t);
    if (n == 1) return body(std::integral_constant<int, 1>{});
    if (n == 2) return body(std::integral_constant<int, 2>{});
    if constexpr (F::most_vectors >= 3)
      if (n == 3) return body(std::integral_constant<int, 3>{});
    if constexpr (F::most_vectors >= 4) return body(std::integral_constant<int, 4>{});
  }

  static constexpr int64_t pack_slack = L * L * 4;  // transposes write whole vectors of units

  // One run of units of tile t to its x^T.
  void pack(int64_t t, int64_t run, float* xt) const {
    const int64_t k0 = run * pack_units, n = std::min(pack_units, units - k0), from = first_vector(t) * L;
    const int64_t tokens = a.m - from, numbers = k0 * F::U::per_unit;
    const X* x = static_cast<const X*>(a.x) + from * a.ldx;
    if constexpr (F::few < 4)
      if (four) return pack_four<typename F::U>(x, a.ldx, tokens, a.reduction, numbers, n, xt + k0 * 4);
    by_vectors(t, [&](auto mv) {
      pack_units_of<mv>(x, std::min<int64_t>(tokens, mv * L), numbers, n, xt + k0 * mv * L);
    });
  }

  // Whole vectors of units; what pack_tile would write beyond the last unit goes to a copy.
  template <int MV>
  void pack_units_of(const X* x, int64_t tokens, int64_t k0, int64_t n, float* to) const {
    const int64_t whole = n / L * L;
    if (whole) pack_tile<typename F::U, MV>(x, a.ldx, tokens, a.reduction, k0, whole, to);
    if (whole == n) return;
    float rest[L * MV * L];
    pack_tile<typename F::U, MV>(x, a.ldx, tokens, a.reduction, k0 + whole * F::U::per_unit, n - whole, rest);
    memcpy(to + whole * MV * L, rest, (n - whole) * MV * L * 4);
  }

  // Sums of output blocks [i, end), one line, for one tile.
  template <int MV, int N> void line(int64_t i, int64_t end, const float* xt, float* sums) const {
    const int64_t numbers = static_cast<int64_t>(pairs) * F::pair_numbers;  // of W in a strip of a block
    for (int64_t j = i; j < end; j++) {
      const int64_t n = ptr[j + 1] - ptr[j];
      const X* w = static_cast<const X*>(a.w) + static_cast<int64_t>(ptr[j]) * strips * numbers;
      for (int g = 0; g < strips; g++, w += n * numbers)
        for (int r = 0; r < F::NR; r += F::R) {
          const int64_t o = j * a.block + g * F::NR + r;
          strip<F, MV, N>(xt, w, idx + ptr[j], n, pairs, r, bias.data() + o, sums + (o - i * a.block) * MV * N);
        }
    }
  }

  // Tiles [t0, t1), of the slab whose x^T this is, times output blocks [o0, o1).
  void panel(int64_t slab, int64_t t0, int64_t t1, int64_t o0, int64_t o1, const float* xt, float* scratch) const {
    float* sums = scratch;
    X* stage = reinterpret_cast<X*>(scratch + sums_floats());
    for (int64_t i = o0; i < o1; i += span) {
      const int64_t end = std::min(o1, i + span), first = i * a.block, outs = std::min(a.outputs, end * a.block) - first;
      for (int64_t t = t0; t < t1; t++) {
        const int64_t from = first_vector(t) * L;
        X* y = static_cast<X*>(a.y) + from * a.ldy + first;
        if constexpr (F::few < 4)
          if (four) {
            line<1, 4>(i, end, at(xt, slab, t), sums);
            write_four(sums, outs, a.m, y, a.ldy);
            continue;
          }
        by_vectors(t, [&](auto mv) {
          line<mv, L>(i, end, at(xt, slab, t), sums);
          for (int v = 0; v < mv; v++)
            write_vector<mv>(sums, v, outs, std::min<int64_t>(L, a.m - from - v * L), y + v * L * a.ldy, a.ldy, stage);
        });
      }
    }
  }

  int64_t line_width() const { return std::max<int64_t>(line_outputs, a.block); }
  int64_t sums_floats() const { return line_width() * F::most_vectors * L; }
  int64_t scratch_floats() const { return sums_floats() + line_width() * L; }

  // One thread's share of the steps. Returns false if it got no memory.
  bool work(Tickets& tickets, float* xt) const {
    static thread_local Scratch memory;
    float* scratch = memory.floats(scratch_floats());
    int64_t ticket = tickets.next(), first = 0;  // `first`: tickets of earlier slabs
    size_t panel0 = 0;
    for (size_t s = 0; s + 1 < slabs.size(); s++) {
      const int64_t last = first + (slabs[s + 1] - slabs[s]) * packs();
      for (; ticket < last; ticket = tickets.take_next()) {
        tickets.wait_for(first);  // x^T of the slab before is done with
        const int64_t t = slabs[s] + (ticket - first) / packs();
        pack(t, (ticket - first) % packs(), const_cast<float*>(at(xt, s, t)));
      }
      size_t panel1 = panel0;
      while (panels[panel1] < slabs[s + 1]) panel1++;
      const int64_t parts = cuts.size() - 1, end = last + (panel1 - panel0) * parts;
      for (; ticket < end; ticket = tickets.take_next()) {
        tickets.wait_for(last);  // all of x^T is there
        const int64_t p = panel0 + (ticket - last) / parts, part = (ticket - last) % parts;
        if (scratch) panel(s, panels[p], panels[p + 1], cuts[part], cuts[part + 1], xt, scratch);
      }
      first = end, panel0 = panel1;
    }
    return scratch;
  }
};

template <class F> int run_packed(const MstPacked& a) {
  const int64_t multiply_adds = static_cast<int64_t>(a.index[ceil_div(a.outputs, a.block)]) * a.block * a.block * a.m;
  const int64_t threads = std::clamp<int64_t>(multiply_adds / work_a_thread, 1, std::max(1, a.threads));
  const PackedKernel<F> kernel(a, threads);
  if constexpr (F::few > 0)
    if (a.m <= F::few) return run_few<typename F::E, F::NR>(a, threads, kernel.cuts, kernel.bias.data());
  static thread_local Scratch memory;
  float* xt = memory.floats(kernel.slab_floats());
  if (!xt) return MST_NO_MEMORY;
  Tickets tickets;
  std::atomic<bool> failed{false};
  if (threads == 1) {
    failed = !kernel.work(tickets, xt);
  } else {
#pragma omp parallel num_threads(threads)
    if (!kernel.work(tickets, xt)) failed = true;
  }
  memory.trim();
  return failed ? MST_NO_MEMORY : MST_OK;
}

}  // namespace
}  // namespace mst

using namespace mst;

MST_API int mst_packed(const MstPacked* arguments) {
  const MstPacked& a = *arguments;
  if (a.block < 1 || a.block > MST_PACKED_LARGEST || (a.block & (a.block - 1))) return MST_BAD_BLOCK;
  if (a.m <= 0 || a.outputs <= 0) return MST_OK;
  int status = MST_NO_MEMORY;
  within_memory([&] {
    status = by_dtype(a.dtype, [&](auto e) {
      using E = typename decltype(e)::type;
      if (a.block == 1) return run_packed<Form<E, 1>>(a);
      if (a.block == 2) return run_packed<Form<E, 2>>(a);
      if (a.block == 4) return run_packed<Form<E, 4>>(a);
      return run_packed<Form<E, 8>>(a);
    });
  });
  return status;
}
