// The product of up to four tokens with packed W in blocks of 4 and more, SIMD over the outputs of a strip.
//
//     for each part of the outputs (threads, dynamic):
//       for each output block, strip:
//         for each active block, pair of the reduction:
//           one load of W, the strip's outputs for the pair; for each token, a broadcast of its pair and a multiply-add
//         write y
//
// W is read in whole vectors: 2 to 5 loads for what takes 9 if tokens are the lanes, so that an instruction window
// reaches four times as far, and rows of x are read as they lie, so that no thread waits for others to transpose them.
#pragma once
#include "spmm_plan.h"
#include "threads.h"

namespace mst {
namespace {

constexpr int packed_ahead = 4096;  // bytes of packed W, asked for while so many are multiplied

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// A strip's outputs for a pair of the reduction, as they lie in W: [NR][2] numbers, as floats. A token's pair fills
// every two lanes, which add up at the end.
template <class E, int NR> struct StripPair {
  using X = float;  // what x is read as
  static constexpr int numbers = NR * 2, N = std::min(L, numbers), vectors = numbers / N;
  using V = typename Floats<N>::type;
  typedef int64_t pair_bits __attribute__((vector_size(4 * N)));
  static MST_INLINE V of_token(const float* x) {
    int64_t bits;
    memcpy(&bits, x, 8);
    return (V)(bits - pair_bits{});
  }
  static MST_INLINE V multiply_add(const E* w, V x, V c) { return widen<N>(w) * x + c; }
  static MST_INLINE v4f outputs(const V (&acc)[vectors], int first) {  // four of them
    float lanes[numbers];
    MST_UNROLL for (int v = 0; v < vectors; v++) store_n<N>(lanes + v * N, acc[v]);
    const v4f a = load4(lanes + 2 * first), b = load4(lanes + 2 * first + 4);
    return MST_SHUFFLE4(a, b, 0, 2, 4, 6) + MST_SHUFFLE4(a, b, 1, 3, 5, 7);
  }
};

#if defined(MST_BF16_PAIRS)
// Or as pairs of bf16, a lane for each output.
template <int NR> struct StripPair<bf16, NR> {
  using X = bf16;
  static constexpr int N = NR, vectors = 1;
  using V = typename Floats<N>::type;
  static MST_INLINE V of_token(const bf16* x) {
    int32_t bits;
    memcpy(&bits, x, 4);
    return (V)(bits - typename Ints<N>::type{});
  }
  static MST_INLINE V multiply_add(const bf16* w, V x, V c) {
    const V pair = load_n<N>(reinterpret_cast<const float*>(w));
    if constexpr (N == 8)
      return (V)_mm256_dpbf16_ps((__m256)c, (__m256bh)(__m256)pair, (__m256bh)(__m256)x);
    else
      return (V)_mm_dpbf16_ps((__m128)c, (__m128bh)(__m128)pair, (__m128bh)(__m128)x);
  }
  static MST_INLINE v4f outputs(const V (&acc)[1], int first) {
    float lanes[N];
    store_n<N>(lanes, acc[0]);
    return load4(lanes + first);
  }
};
#endif

// Up to how many tokens W is read so. A broadcast serves one row of lanes: where it is of four alone, tokens as lanes
// (spmm_packed.cpp) need no more of them from three on.
template <class E, int NR> constexpr int few_packed_tokens() {
  if constexpr (NR < 4) return 0;
  else return StripPair<E, NR>::N * StripPair<E, NR>::vectors >= 8 ? 4 : 2;
}

// ---- the product of a strip ----------------------------------------------------------------------------------------

// y of NR outputs and M tokens; w: the strip's first block, `outputs` of its rows are there.
template <class E, int NR, int M>
MST_NOINLINE void few_strip(const typename StripPair<E, NR>::X* x, int64_t ldx, const E* w, const int32_t* idx, int64_t n,
                            int block, const float* bias, E* y, int64_t ldy, int64_t outputs) {
  using S = StripPair<E, NR>;
  constexpr int at_once = NR / 2;  // pairs, of blocks of NR all
  constexpr int sets = std::clamp(8 / (M * S::vectors), 1, at_once);  // of accumulators: 8 hide a multiply-add's latency
  constexpr int vector_numbers = NR * 2 / S::vectors, prefetch_every = std::max<int>(1, 64 / (NR * 2 * sizeof(E)));
  typename S::V acc[sets][M][S::vectors] = {};
  for (int64_t q = 0; q < n; q++) {
    const auto* xk = x + static_cast<int64_t>(idx[q]) * block;
#pragma GCC unroll 1
    for (int k = 0; k < block; k += 2 * at_once) {
      MST_UNROLL for (int u = 0; u < at_once; u++) {
        if (u % prefetch_every == 0)
          __builtin_prefetch(reinterpret_cast<const char*>(w + u * 2 * NR) + packed_ahead, 0, 3);
        MST_UNROLL for (int t = 0; t < M; t++) {
          const typename S::V pair = S::of_token(xk + t * ldx + 2 * u);
          MST_UNROLL for (int v = 0; v < S::vectors; v++) {
            typename S::V& sum = acc[u % sets][t][v];
            sum = S::multiply_add(w + u * 2 * NR + v * vector_numbers, pair, sum);
          }
        }
      }
      xk += 2 * at_once, w += at_once * 2 * NR;
    }
  }
  MST_UNROLL for (int t = 0; t < M; t++) {
    MST_UNROLL for (int s = 1; s < sets; s++)
      MST_UNROLL for (int v = 0; v < S::vectors; v++) acc[0][t][v] += acc[s][t][v];
    const bool whole = outputs >= NR;
    E edge[NR];
    E* to = whole ? y + t * ldy : edge;
    MST_UNROLL for (int r = 0; r < NR; r += 4) store4(to + r, S::outputs(acc[0][t], r) + load4(bias + r));
    if (!whole) memcpy(static_cast<void*>(y + t * ldy), edge, outputs * sizeof(E));
  }
}

// ---- the loops -----------------------------------------------------------------------------------------------------

// Rows of x as a kernel reads them: with zeros up to whole blocks.
template <class X, class E> struct TokenRows {
  const X* rows;
  int64_t apart;

  // Where they lie, or a copy in `memory`; false if there is none to be had.
  bool take(const MstPacked& a, Scratch& memory) {
    const E* x = static_cast<const E*>(a.x);
    if (std::is_same_v<X, E> && a.reduction % a.block == 0) {
      rows = reinterpret_cast<const X*>(x), apart = a.ldx;
      return true;
    }
    apart = ceil_div(a.reduction, a.block) * a.block;
    float* room = memory.floats(ceil_div(a.m * apart * sizeof(X), 4));
    if (!room) return false;
    X* to = reinterpret_cast<X*>(room);
    rows = to;
    for (int64_t t = 0; t < a.m; t++, x += a.ldx, to += apart) {
      if constexpr (std::is_same_v<X, E>)
        memcpy(static_cast<void*>(to), x, a.reduction * sizeof(X));
      else
        for (int64_t k = 0; k < a.reduction; k++) to[k] = to_float(x[k]);
      memset(static_cast<void*>(to + a.reduction), 0, (apart - a.reduction) * sizeof(X));
    }
    return true;
  }
};

template <class E, int NR, int M>
void few_part(const MstPacked& a, const typename StripPair<E, NR>::X* x, int64_t ldx, const float* bias, int64_t first,
              int64_t end) {
  const int32_t *ptr = a.index, *idx = ptr + ceil_div(a.outputs, a.block) + 1;
  const int64_t strip_numbers = static_cast<int64_t>(a.block) * NR;  // of W in a block
  for (int64_t i = first; i < end; i++) {
    const int64_t n = ptr[i + 1] - ptr[i];
    const E* w = static_cast<const E*>(a.w) + static_cast<int64_t>(ptr[i]) * a.block * a.block;
    for (int64_t o = i * a.block; o < std::min(a.outputs, (i + 1) * a.block); o += NR, w += n * strip_numbers)
      few_strip<E, NR, M>(x, ldx, w, idx + ptr[i], n, a.block, bias + o, static_cast<E*>(a.y) + o, a.ldy, a.outputs - o);
  }
}

// y of up to few_packed_tokens. `cuts` are output blocks, `bias` is that of whole blocks.
template <class E, int NR>
int run_few(const MstPacked& a, int64_t threads, const std::vector<int64_t>& cuts, const float* bias) {
  Scratch& memory = caller_memory();
  TokenRows<typename StripPair<E, NR>::X, E> x;
  if (!x.take(a, memory)) return MST_NO_MEMORY;
  by_threads(cuts.size() - 1, threads, 0, [&](int64_t part, float*) {
    const int64_t first = cuts[part], end = cuts[part + 1];
    if (a.m == 1) few_part<E, NR, 1>(a, x.rows, x.apart, bias, first, end);
    if (a.m == 2) few_part<E, NR, 2>(a, x.rows, x.apart, bias, first, end);
    if (a.m == 3) few_part<E, NR, 3>(a, x.rows, x.apart, bias, first, end);
    if (a.m == 4) few_part<E, NR, 4>(a, x.rows, x.apart, bias, first, end);
  });
  memory.trim();
  return MST_OK;
}

}  // namespace
}  // namespace mst
