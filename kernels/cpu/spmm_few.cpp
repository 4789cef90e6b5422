// The product of spmm.cpp for few tokens, as when text is generated: bound by how fast W can be read.
//
// Each active block is read once from where it lies, nothing is packed. Vectors run along the rows of W, whose blocks
// are strips of B numbers.
//
// Outputs are rows of W:                                     outputs are columns of W:
//
//     for each output block (threads, dynamic):                  for each part of the outputs (threads, dynamic):
//       for each group of its outputs, of tokens:                  for each block row of W, group of tokens:
//         NR x T vector accumulators in registers, across            for each active block in the part:
//         ALL active blocks of the output block:                       B * T sums of floats, from L1 or L2
//           for each active block, strip:                              for each row of the block:
//             T loads of x, NR of W, NR * T multiply-adds                1 load of W, T broadcasts, T multiply-adds
//         add up the lanes, write y
//
// Both read W along its rows, so that a block row's pages and, with blocks narrower than a cache line, its lines are
// met again while they are at hand. With one token a number of W takes one multiply-add: 64 bytes of floats are done in
// half a cycle, and take two to come from L2, about six from L3, more from memory. So what counts is how many lines are
// read. Those of 64 bytes hold two float blocks of 8 side by side, or four of bf16: of a dense weight's lines 1 - (1 -
// d)^2 or 1 - (1 - d)^4 are read at density d, 0.36 or 0.59 at 0.2, and d itself from blocks of 16 or 32 on.
//
// Groups of outputs and tokens reread W from L1. From some tens of tokens on the packed product wins: its lanes are
// tokens and need no adding up. How many, few_tokens says.
#include "spmm_pack.h"
#include "threads.h"

namespace mst {
namespace {

constexpr int most_tokens = L == 16 ? 4 : 2;    // of a group
constexpr int64_t tokens_at_once = 16;          // whose sums are kept, where outputs are columns
constexpr int64_t sums_bytes = 256 << 10;       // of a part of the outputs: stays in L2
constexpr int64_t work_a_thread = 16 << 10;     // multiply-adds that are worth waking a thread for

// Lanes of a vector for strips of n units.
constexpr int lanes_for(int n) { return n % L == 0 ? L : n % 8 == 0 && L > 8 ? 8 : 4; }

// ---- arithmetic ----------------------------------------------------------------------------------------------------

// What strips of W and x are multiplied in: floats.
template <class X, class W, int B> struct Wide {
  static constexpr int lanes = lanes_for(B), per_unit = 1;
  using Vector = typename Floats<lanes>::type;
  static MST_INLINE Vector weights(const W* w) {
    if constexpr (std::is_same_v<X, W> || std::is_same_v<X, float>)
      return widen<lanes>(w);
    else
      return round_to<X, lanes>(widen<lanes>(w));
  }
  static MST_INLINE Vector multiply_add(Vector a, Vector b, Vector c) { return a * b + c; }
};

#if defined(MST_BF16_PAIRS)
// Or pairs of bf16.
template <class W, int B> struct Pairs {
  static constexpr int lanes = lanes_for(B / 2), per_unit = 2;
  using Vector = typename Floats<lanes>::type;
  static MST_INLINE Vector weights(const bf16* w) {
    Vector v;
    memcpy(&v, w, sizeof v);
    return v;
  }
  static MST_INLINE Vector weights(const float* w) {
    if constexpr (lanes == 16) return (Vector)_mm512_cvtne2ps_pbh(_mm512_loadu_ps(w + 16), _mm512_loadu_ps(w));
    if constexpr (lanes == 8) return (Vector)_mm512_cvtneps_pbh(_mm512_loadu_ps(w));
    if constexpr (lanes == 4) return (Vector)_mm256_cvtneps_pbh(_mm256_loadu_ps(w));
  }
  static MST_INLINE Vector multiply_add(Vector a, Vector b, Vector c) {
    if constexpr (lanes == 16) return (Vector)_mm512_dpbf16_ps((__m512)c, (__m512bh)(__m512)a, (__m512bh)(__m512)b);
    if constexpr (lanes == 8) return (Vector)_mm256_dpbf16_ps((__m256)c, (__m256bh)(__m256)a, (__m256bh)(__m256)b);
    if constexpr (lanes == 4) return (Vector)_mm_dpbf16_ps((__m128)c, (__m128bh)(__m128)a, (__m128bh)(__m128)b);
  }
};
template <class X, class W, int B>
using Arithmetic = std::conditional_t<std::is_same_v<X, bf16> && B % 8 == 0, Pairs<W, B>, Wide<X, W, B>>;
#else
template <class X, class W, int B> using Arithmetic = Wide<X, W, B>;
#endif

// ---- tokens --------------------------------------------------------------------------------------------------------

// Rows of units; `ld` counts bytes.
struct Tokens {
  const char* data;
  int64_t ld;
  const char* at(int64_t token, int64_t unit) const { return data + token * ld + unit * 4; }
};

// x as it lies if that is what is wanted of it, else as floats or copied, in `width` columns: zeros beyond its own.
// False if there is no memory.
template <class E, class X>
bool tokens_of(const MstSpmm& a, int64_t reduction, int64_t width, Scratch& memory, Tokens* to) {
  const X* x = static_cast<const X*>(a.x);
  if (std::is_same_v<E, X> && width == reduction) {
    *to = {reinterpret_cast<const char*>(x), a.ldx * static_cast<int64_t>(sizeof(X))};
    return true;
  }
  E* copy = reinterpret_cast<E*>(memory.floats(a.m * width));
  if (!copy) return false;
  for (int64_t t = 0; t < a.m; t++) {
    E* row = copy + t * width;
    if constexpr (std::is_same_v<E, X>)
      memcpy(static_cast<void*>(row), x + t * a.ldx, reduction * sizeof(X));
    else
      for (int64_t k = 0; k < reduction; k++) row[k] = to_float(x[t * a.ldx + k]);
    memset(static_cast<void*>(row + reduction), 0, (width - reduction) * sizeof(E));
  }
  *to = {reinterpret_cast<const char*>(copy), width * static_cast<int64_t>(sizeof(E))};
  return true;
}

// Calls body(t, T) with T a constant, for groups of tokens [t, t + T).
template <class Body> MST_INLINE void by_groups(int64_t begin, int64_t end, Body body) {
  int64_t t = begin;
  for (; t + most_tokens <= end; t += most_tokens) body(t, std::integral_constant<int, most_tokens>{});
  if (most_tokens > 2 && t + 2 <= end) body(t, std::integral_constant<int, 2>{}), t += 2;
  if (t < end) body(t, std::integral_constant<int, 1>{});
}

// ---- outputs are rows of W -----------------------------------------------------------------------------------------

// sums[T][NR] += NR rows of active blocks times T tokens.
template <class A, int B, int NR, int T, class W>
MST_NOINLINE void row_tile(const W* w, int64_t ldw, const int32_t* idx, int64_t n, Tokens x, float* sums) {
  using Vector = typename A::Vector;
  Vector acc[NR][T];
  MST_UNROLL for (int r = 0; r < NR; r++)
    MST_UNROLL for (int t = 0; t < T; t++) acc[r][t] = Vector{};
  for (int64_t q = 0; q < n; q++) {
    const W* wq = w + static_cast<int64_t>(idx[q]) * B;
    const char* xq = x.at(0, static_cast<int64_t>(idx[q]) * (B / A::per_unit));
    MST_UNROLL for (int s = 0; s < B / A::per_unit; s += A::lanes) {
      Vector b[T];
      MST_UNROLL for (int t = 0; t < T; t++) memcpy(&b[t], xq + t * x.ld + s * 4, sizeof(Vector));
      MST_UNROLL for (int r = 0; r < NR; r++) {
        const Vector a = A::weights(wq + r * ldw + s * A::per_unit);
        MST_UNROLL for (int t = 0; t < T; t++) acc[r][t] = A::multiply_add(a, b[t], acc[r][t]);
      }
    }
  }
  const auto quarter = [](Vector v) {  // lanes added up to four
    float lanes[A::lanes];
    store_n<A::lanes>(lanes, v);
    v4f sum = load4(lanes);
    MST_UNROLL for (int i = 4; i < A::lanes; i += 4) sum += load4(lanes + i);
    return sum;
  };
  MST_UNROLL for (int t = 0; t < T; t++)
    MST_UNROLL for (int r = 0; r < NR; r += 4) {
      v4f e = quarter(acc[r][t]), f = quarter(acc[r + 1][t]), g = quarter(acc[r + 2][t]), h = quarter(acc[r + 3][t]);
      transpose4(e, f, g, h);
      store4(sums + t * NR + r, load4(sums + t * NR + r) + ((e + f) + (g + h)));
    }
}

// Asks for a strip of B numbers in each of `rows` rows. The blocks of the next block row are asked for while this one's
// are multiplied. They are lines at steps of a row, which no processor foresees, and the arithmetic of several tokens
// leaves it too few loads to wait for at once: four tokens would else take twice as long as one where lists are short
// (from memory; 1.2 to 1.7 times as long from the cache), and a half more than that along columns.
template <int B, class W> MST_INLINE void ask_for(const W* w, int64_t ldw, int64_t rows) {
  for (int64_t r = 0; r < rows; r++)
    MST_UNROLL for (size_t at = 0; at < B * sizeof(W); at += 64)
      __builtin_prefetch(reinterpret_cast<const char*>(w + r * ldw) + at, 0, 3);
}

template <class X, class W, int B> struct Rows {
  using A = Arithmetic<X, W, B>;
  using Input = std::conditional_t<A::per_unit == 1, float, X>;
  static constexpr int group = B % 8 == 0 ? 8 : 4;  // outputs
  const Problem& p;
  Tokens x;
  X* y;
  int64_t ldy;

  // Outputs [o, o + NR) of output block i for tokens [t, t + T).
  template <int NR, int T> void tile(int64_t i, int64_t o, int64_t t) const {
    const int outputs = static_cast<int>(std::min<int64_t>(NR, p.outputs - o));
    if (outputs <= 0) return;
    float sums[T][NR];
    for (int s = 0; s < T; s++) memcpy(sums[s], p.bias + o, sizeof sums[s]);
    const W* w = static_cast<const W*>(p.w);
    const int32_t* idx = p.lists.idx + p.lists.ptr[i];
    const int64_t n = p.lists.ptr[i + 1] - p.lists.ptr[i];
    // Blocks that reach beyond W are copied.
    const bool last_is_cut = n > 0 && p.reduction < (static_cast<int64_t>(idx[n - 1]) + 1) * B;
    const int64_t whole = outputs < NR ? 0 : n - last_is_cut;
    const Tokens from{x.at(t, 0), x.ld};
    row_tile<A, B, NR, T>(w + o * p.ldw, p.ldw, idx, whole, from, sums[0]);
    for (int64_t q = whole; q < n; q++) {
      const int64_t k = static_cast<int64_t>(idx[q]) * B;
      W copy[NR][B] = {};
      for (int r = 0; r < outputs; r++)
        memcpy(static_cast<void*>(copy[r]), w + (o + r) * p.ldw + k, std::min<int64_t>(B, p.reduction - k) * sizeof(W));
      const int32_t here = 0;
      row_tile<A, B, NR, T>(copy[0], B, &here, 1, {from.at(0, k / A::per_unit), x.ld}, sums[0]);
    }
    for (int s = 0; s < T; s++) convert(sums[s], y + (t + s) * ldy + o, outputs);
  }

  void output_block(int64_t i) const {
    if (i + 1 < p.out_blocks)  // the lines of y that are written next arrive while sums are computed
      for (int64_t t = 0; t < p.m; t++)
        for (int o = 0; o < B; o += 64 / sizeof(X)) __builtin_prefetch(y + t * ldy + (i + 1) * B + o, 1, 3);
    if (p.m > 1 && i + 1 < p.out_blocks) {  // one token leaves the processor room to look ahead by itself
      const W* w = static_cast<const W*>(p.w) + (i + 1) * B * p.ldw;
      const int64_t height = std::min<int64_t>(B, p.outputs - (i + 1) * B);
      for (int64_t q = p.lists.ptr[i + 1]; q < p.lists.ptr[i + 2]; q++)
        ask_for<B>(w + static_cast<int64_t>(p.lists.idx[q]) * B, p.ldw, height);
    }
    for (int g = 0; g < B; g += group)
      by_groups(0, p.m, [&](int64_t t, auto tokens) {
        constexpr int T = tokens, NR = T == 4 || (T == 2 && L < 16) ? 4 : group;
        for (int r = 0; r < group; r += NR) tile<NR, T>(i, i * B + g + r, t);
      });
  }
};

template <class X, class W, int B> int run_rows(const Problem& p, const MstSpmm& a, int64_t threads) {
  Scratch& memory = caller_memory();
  Rows<X, W, B> kernel{p, {}, static_cast<X*>(a.y), a.ldy};
  if (!tokens_of<typename Rows<X, W, B>::Input, X>(a, p.reduction, p.red_blocks * B, memory, &kernel.x))
    return MST_NO_MEMORY;
  const int64_t items = threads == 1 ? 1 : std::min(p.out_blocks, 8 * threads);
  by_threads(items, threads, 0, [&](int64_t item, float*) {
    for (int64_t i = item * p.out_blocks / items; i < (item + 1) * p.out_blocks / items; i++) kernel.output_block(i);
  });
  memory.trim();
  return MST_OK;
}

// ---- outputs are columns of W --------------------------------------------------------------------------------------

// sums[T][B] += T tokens times `rows` rows of an active block.
template <class X, class W, int B, int T>
MST_NOINLINE void add_block(const W* w, int64_t ldw, int rows, Tokens x, float* sums, int64_t lds) {
  using A = Wide<X, W, B>;
  using Vector = typename A::Vector;
  constexpr int strips = B / A::lanes, at_once = strips % 2 ? 1 : strips % 4 == 0 && T == 1 ? 4 : 2;
  for (int s = 0; s < strips; s += at_once) {
    Vector acc[at_once][T];
    float* to = sums + s * A::lanes;
    MST_UNROLL for (int v = 0; v < at_once; v++)
      MST_UNROLL for (int t = 0; t < T; t++) acc[v][t] = load_n<A::lanes>(to + t * lds + v * A::lanes);
#pragma GCC unroll 4
    for (int k = 0; k < rows; k++) {
      Vector a[at_once];
      MST_UNROLL for (int v = 0; v < at_once; v++) a[v] = A::weights(w + k * ldw + (s + v) * A::lanes);
      MST_UNROLL for (int t = 0; t < T; t++) {
        float b;
        memcpy(&b, x.at(t, k), sizeof b);
        MST_UNROLL for (int v = 0; v < at_once; v++) acc[v][t] = a[v] * b + acc[v][t];
      }
    }
    MST_UNROLL for (int v = 0; v < at_once; v++)
      MST_UNROLL for (int t = 0; t < T; t++) store_n<A::lanes>(to + t * lds + v * A::lanes, acc[v][t]);
  }
}

template <class X, class W, int B> struct Cols {
  const Problem& p;
  const Lists rows;  // active output blocks of each reduction block
  Tokens x;          // floats
  X* y;
  int64_t ldy;

  // The active blocks of block row i in [j0, j1).
  std::pair<const int32_t*, const int32_t*> range(int64_t i, int64_t j0, int64_t j1) const {
    const int32_t *begin = rows.idx + rows.ptr[i], *end = rows.idx + rows.ptr[i + 1];
    if (j0 > 0) begin = std::lower_bound(begin, end, static_cast<int32_t>(j0));
    if (j1 < p.out_blocks) end = std::lower_bound(begin, end, static_cast<int32_t>(j1));
    return {begin, end};
  }

  // Output blocks [j0, j1) of tokens [t0, t1); sums: [token][output].
  void part(int64_t j0, int64_t j1, int64_t t0, int64_t t1, float* sums) const {
    const int64_t lds = (j1 - j0) * B, outputs = std::min(p.outputs, j1 * B) - j0 * B;
    const W* w = static_cast<const W*>(p.w);
    for (int64_t t = t0; t < t1; t++) memcpy(sums + (t - t0) * lds, p.bias + j0 * B, lds * sizeof(float));
    std::pair<const int32_t*, const int32_t*> next = range(0, j0, j1);
    for (int64_t i = 0; i < p.red_blocks; i++) {
      const auto [begin, end] = next;
      if (i + 1 < p.red_blocks) {
        next = range(i + 1, j0, j1);
        const int64_t height = std::min<int64_t>(B, p.reduction - (i + 1) * B);
        for (const int32_t* j = next.first; j < next.second; j++)
          ask_for<B>(w + (i + 1) * B * p.ldw + static_cast<int64_t>(*j) * B, p.ldw, height);
      }
      const int height = static_cast<int>(std::min<int64_t>(B, p.reduction - i * B));
      by_groups(t0, t1, [&, begin = begin, end = end](int64_t t, auto T) {
        for (const int32_t* j = begin; j < end; j++)
          block<T>(w + i * B * p.ldw, *j, height, {x.at(t, i * B), x.ld}, sums + (t - t0) * lds + (*j - j0) * B, lds);
      });
    }
    for (int64_t t = t0; t < t1; t++)
      convert(sums + (t - t0) * lds, y + t * ldy + j0 * B, static_cast<int>(outputs));
  }

  // w: the block row's first number.
  template <int T>
  MST_INLINE void block(const W* w, int64_t j, int height, Tokens from, float* sums, int64_t lds) const {
    const int64_t width = p.outputs - j * B;
    if (width >= B) return add_block<X, W, B, T>(w + j * B, p.ldw, height, from, sums, lds);
    W copy[B][B] = {};
    for (int k = 0; k < height; k++)
      memcpy(static_cast<void*>(copy[k]), w + k * p.ldw + j * B, width * sizeof(W));
    add_block<X, W, B, T>(copy[0], B, height, from, sums, lds);
  }
};

template <class X, class W, int B> int run_cols(const Problem& p, const MstSpmm& a, int64_t threads) {
  Scratch& memory = caller_memory();
  Cols<X, W, B> kernel{p, by_rows(a.index, p.red_blocks), {}, static_cast<X*>(a.y), a.ldy};
  if (!tokens_of<float, X>(a, p.reduction, p.reduction, memory, &kernel.x)) return MST_NO_MEMORY;
  // Parts with as many active blocks each, about.
  const int64_t tokens = std::min(p.m, tokens_at_once), active = p.lists.ptr[p.out_blocks];
  int64_t parts = ceil_div(p.out_blocks * B * tokens * 4, sums_bytes);
  parts = std::min(p.out_blocks, ceil_div(parts, threads) * threads);
  std::vector<int64_t> cuts{0};
  int64_t widest = 0;
  for (int64_t part = 1; part <= parts; part++) {
    const int32_t* ptr = p.lists.ptr;
    int64_t to = p.out_blocks;
    if (part < parts) to = std::lower_bound(ptr, ptr + p.out_blocks, active * part / parts) - ptr;
    widest = std::max(widest, to - cuts.back());
    cuts.push_back(to);
  }
  const bool ok = by_threads(parts, threads, widest * B * tokens, [&](int64_t part, float* sums) {
    if (cuts[part] == cuts[part + 1]) return;
    for (int64_t t = 0; t < p.m; t += tokens)
      kernel.part(cuts[part], cuts[part + 1], t, std::min(p.m, t + tokens), sums);
  });
  memory.trim();
  return ok ? MST_OK : MST_NO_MEMORY;
}

}  // namespace

// Up to how many tokens this was faster than the packed product, on one thread of a Zen 5 and on two (weights of
// 3072 x 768, 768 x 3072 and 1536 x 1536, densities of .05 to .8, 12 to 128 tokens). Along rows an output costs an adding
// up of lanes whatever its length, so that with short ones the packed product is faster sooner: `elements` are those of W
// that an output is a sum of, on average. Narrow blocks fill no vector. Along columns bf16 is widened, and so half as fast
// as what the packed product does. Where that differs from one number for each dtype and direction, which stood here, it
// is 1.22 times as fast on average, at worst .75, at best 2.9 times.
int64_t few_tokens(const MstSpmm& a) {
  bool floats = false;
  by_dtype(a.x_dtype, [&](auto x) {
    floats = std::is_same_v<typename decltype(x)::type, float>;
    return MST_OK;
  });
  if (!a.outputs_are_rows) return !floats ? 12 : a.block < 16 ? 16 : 64;
  const int64_t rows = ceil_div(a.rows, a.block), elements = by_rows(a.index, rows).ptr[rows] * a.block / rows;
  if (a.block < 8) return floats ? 48 : 24;
  if (a.block < 16) return std::min<int64_t>(floats ? 96 : 32, (floats ? 20 : 8) + elements * 3 / 10);
  if (floats) return std::min<int64_t>(128, 8 + elements / 4);
  return std::min<int64_t>(a.block < 32 ? 64 : 128, 10 + elements / 10);
}

int spmm_few(const MstSpmm& a) {
  int status = MST_NO_MEMORY;
  within_memory([&] {
    status = by_product(a.x_dtype, a.w_dtype, [&](auto x, auto w) {
      using X = typename decltype(x)::type;
      using W = typename decltype(w)::type;
      return by_block(a.block, [&](auto block) -> int {
        if constexpr (block % 4 == 0) {
          const Problem p(a);
          const int64_t work = static_cast<int64_t>(p.lists.ptr[p.out_blocks]) * block * block * a.m;
          const int64_t threads = std::clamp<int64_t>(work / work_a_thread, 1, p.threads);
          return a.outputs_are_rows ? run_rows<X, W, block>(p, a, threads) : run_cols<X, W, block>(p, a, threads);
        }
        return MST_BAD_BLOCK;
      });
    });
  });
  return status;
}

}  // namespace mst
