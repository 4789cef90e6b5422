// Weight gradient on the active blocks: out[r, c] = sum over tokens of a[m, r] . b[m, c].
//
// Loop nest:
//
//     for each thread's part of W (rows x columns, equal active blocks; no barrier anywhere):
//       for each piece of its block rows whose sums fit in `piece_bytes`:          bounds memory for huge layers
//         for each panel of tokens:
//           pack a (this piece's rows) to strips [rows / RT][tokens][RT]; add up its columns if asked (bias gradient)
//           for each chunk of columns, which stays in L2:
//             pack b to strips [columns / SW][tokens][SW], SW = min(block, L); likewise
//             for each block row, each group of S * L / SW active strips of it, each row strip of the block:
//               RT x S vector accumulators in registers over the panel's tokens:
//                 S loads of b, RT broadcasts of a, RT * S multiply-adds
//               add them to the sums, [strip][RT][SW] floats
//         write the piece's rows of `out` once: converted sums on active blocks, zeros between them
//
// Strips of one block row are joined freely, so a vector holds 2 blocks of 8 or 4 of 4 and the tile stays full for any
// block size. Intensity with AVX-512: 8 x 3 = 24 multiply-adds for 11 loads, 14 where strips are joined in pairs. With
// blocks of 4 that would be 4 x 3 for 16; there a vector holds four tokens of one strip instead, as they lie packed, and
// the four are added up at the end of the panel: 24 multiply-adds for 7 loads and 4 shuffles.
#include "grad_weight_parts.h"

namespace mst {
namespace {

constexpr int64_t panel_units = 128;       // tokens (pairs of tokens in bf16) per panel
constexpr int64_t chunk_bytes = 400 << 10; // of packed b, out of 1 MB of L2
constexpr int S = 3;                       // vectors per tile

template <int B> struct Tiling {
  static constexpr int SW = B < L ? B : L;                 // width of a strip of b
  static constexpr int RT = (L == 16 && B >= 8) ? 8 : 4;   // rows of a tile
  static constexpr int parts = L / SW;                     // strips per vector
};

// ---- packing -------------------------------------------------------------------------------------------------------

// One unit of W columns: dst[c] = row0[c], or the pair (row0[c], row1[c]).
template <class U, int W, class E>
MST_INLINE void pack_unit(const E* row0, [[maybe_unused]] const E* row1, float* dst) {
  [[maybe_unused]] constexpr int N = numbers_at_once<E, W>;
  if constexpr (U::per_unit == 1) {
    for (int c = 0; c < W; c += N) store_n<N>(dst + c, load_n<N>(row0 + c));
  } else {
#if defined(MST_BF16_PAIRS)
    if constexpr (W == 4) {
      const __m128i lo = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row0));
      const __m128i hi = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(row1));
      _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm_unpacklo_epi16(lo, hi));
    } else if constexpr (W == 8) {
      const __m256i lo = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row0)));
      const __m256i hi = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row1)));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(dst), _mm256_or_si256(lo, _mm256_slli_epi32(hi, 16)));
    } else {
      const __m512i lo = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row0)));
      const __m512i hi = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row1)));
      _mm512_storeu_si512(dst, _mm512_or_si512(lo, _mm512_slli_epi32(hi, 16)));
    }
#endif
  }
}

template <int W, class E> MST_INLINE void add_row(const E* row, float (&sum)[W]) {
  constexpr int N = numbers_at_once<E, W>;
  for (int c = 0; c < W; c += N) store_n<N>(sum + c, load_n<N>(sum + c) + load_n<N>(row + c));
}

// `units` units of one strip from full rows; adds their columns to sum if SUM.
template <class U, int W, bool SUM, class E>
MST_INLINE void pack_visit(const E* row, int64_t ld, int units, bool fetch_ahead, int ahead, float* to,
                           float (&sum)[W]) {
  constexpr int P = U::per_unit;
  for (int u = 0; u < units; u++, row += P * ld) {
    const E* second = row + (P - 1) * ld;
    if (fetch_ahead) {
      prefetch(row + ahead * P * ld);
      if (P == 2) prefetch(second + ahead * P * ld);
    }
    pack_unit<U, W>(row, second, to + u * W);
    if (SUM) {
      add_row<W>(row, sum);
      if (P == 2) add_row<W>(second, sum);
    }
  }
}

// dst[strip][unit][W] from columns [col0, ...) of `tokens` rows of src, zero beyond `width` and the last token, up to whole
// visits.
// colsum, if SUM, points at column col0.
template <class U, int W, bool SUM, class E>
void pack_strips(const E* src, int64_t ld, int64_t tokens, int64_t col0, int64_t width, int64_t strips, int64_t stride,
                 float* dst, float* colsum) {
  constexpr int P = U::per_unit;
  constexpr int at_once = 8;  // units per visit of a strip: a few streams to read, some cache lines to write
  constexpr int strips_per_line = std::max<int>(1, 64 / (W * sizeof(E)));
  for (int64_t u0 = 0; u0 * P < tokens; u0 += at_once) {
    const bool whole_rows = (u0 + at_once) * P <= tokens;
    for (int64_t s = 0; s < strips; s++) {
      const int64_t c = col0 + s * W;
      const E* row = src + u0 * P * ld + c;
      float* to = dst + s * stride + u0 * W;
      float sum[W] = {};
      if (whole_rows && c + W <= width) {
        // Fetch the next visit's rows: the rows are too many, and too short, for the hardware to foresee them.
        if (s % strips_per_line == 0)
          pack_visit<U, W, SUM>(row, ld, at_once, true, at_once, to, sum);
        else
          pack_visit<U, W, SUM>(row, ld, at_once, false, at_once, to, sum);
      } else {
        const int64_t n = std::clamp<int64_t>(width - c, 0, W), left = std::min<int64_t>(tokens - u0 * P, at_once * P);
        E edge[at_once * P * W] = {};
        for (int64_t i = 0; i < left; i++) memcpy(static_cast<void*>(edge + i * W), row + i * ld, n * sizeof(E));
        pack_visit<U, W, SUM>(edge, W, at_once, false, 0, to, sum);
      }
      if (SUM)
        for (int64_t i = 0; i < W && c + i < width; i++) colsum[s * W + i] += sum[i];
    }
  }
}

template <class U, int W, class E>
void pack(const E* src, int64_t ld, int64_t tokens, int64_t col0, int64_t width, int64_t strips, int64_t stride,
          float* dst, float* colsum) {
  if (colsum)
    pack_strips<U, W, true>(src, ld, tokens, col0, width, strips, stride, dst, colsum);
  else
    pack_strips<U, W, false>(src, ld, tokens, col0, width, strips, stride, dst, nullptr);
}

// ---- the tile ------------------------------------------------------------------------------------------------------

template <int SW> MST_INLINE void add_piece(float* to, typename Floats<SW>::type v, bool first) {
  store_n<SW>(to, first ? v : load_n<SW>(to) + v);
}

// Adds the vector v, made of `parts` strips' rows, to the sums of each strip.
template <int parts> MST_INLINE void add_to(float* const* sums, int64_t at, vf v, bool first) {
  constexpr int SW = L / parts;
  if constexpr (parts == 1) {
    store(sums[0] + at, first ? v : load(sums[0] + at) + v);
  } else {
    add_piece<SW>(sums[0] + at, piece<parts, 0>(v), first);
    add_piece<SW>(sums[1] + at, piece<parts, 1>(v), first);
    if constexpr (parts == 4) {
      add_piece<SW>(sums[2] + at, piece<parts, 2>(v), first);
      add_piece<SW>(sums[3] + at, piece<parts, 3>(v), first);
    }
  }
}

// V vectors of joined strips against one row strip.
template <class U, int RT, int V, int parts>
MST_NOINLINE void tile(const float* a, const float* const* strips, int64_t units, float* const* sums, bool first) {
  constexpr int SW = L / parts;
  const float* from[V * parts];
  MST_UNROLL for (int i = 0; i < V * parts; i++) from[i] = strips[i];
  vf acc[RT][V];
  MST_UNROLL for (int r = 0; r < RT; r++) MST_UNROLL for (int v = 0; v < V; v++) acc[r][v] = vf{};
  if (!first)
    for (int i = 0; i < V * parts; i++)
      for (int c = 0; c < RT * SW; c += 16) prefetch(sums[i] + c);
#pragma GCC unroll 2
  for (int64_t u = 0; u < units; u++) {
    vf b[V];
    MST_UNROLL for (int v = 0; v < V; v++) b[v] = join<parts>(from + v * parts, u * SW);
    MST_UNROLL for (int r = 0; r < RT; r++) {
      const vf x = broadcast(a[u * RT + r]);
      MST_UNROLL for (int v = 0; v < V; v++) acc[r][v] = U::multiply_add(x, b[v], acc[r][v]);
    }
  }
  MST_UNROLL for (int r = 0; r < RT; r++)
    MST_UNROLL for (int v = 0; v < V; v++) add_to<parts>(sums + v * parts, r * SW, acc[r][v], first);
}

#if defined(MST_AVX512)
// V blocks of 4 against the 4 rows that they share, four units at a time.
template <class U, int V>
MST_NOINLINE void tile_of_fours(const float* a, const float* const* strips, int64_t units, float* const* sums,
                                bool first) {
  const float* from[V];
  vf acc[V][4];
  MST_UNROLL for (int v = 0; v < V; v++) {
    from[v] = strips[v];
    MST_UNROLL for (int r = 0; r < 4; r++) acc[v][r] = vf{};
  }
  for (int64_t at = 0; at < units * 4; at += L) {
    const __m512 x = (__m512)load(a + at);
    const vf row[4] = {(vf)_mm512_permute_ps(x, 0x00), (vf)_mm512_permute_ps(x, 0x55), (vf)_mm512_permute_ps(x, 0xaa),
                       (vf)_mm512_permute_ps(x, 0xff)};
    MST_UNROLL for (int v = 0; v < V; v++) {
      const vf b = load(from[v] + at);
      MST_UNROLL for (int r = 0; r < 4; r++) acc[v][r] = U::multiply_add(row[r], b, acc[v][r]);
    }
  }
  MST_UNROLL for (int v = 0; v < V; v++) {
    const vf sum = sum_groups(acc[v]);
    store(sums[v], first ? sum : load(sums[v]) + sum);
  }
}

template <class U, int V = 6>
MST_INLINE void tiles_of_fours(int blocks, const float* a, const float* const* strips, int64_t units,
                               float* const* sums, bool first) {
  if constexpr (V > 1)
    if (blocks < V) return tiles_of_fours<U, V - 1>(blocks, a, strips, units, sums, first);
  tile_of_fours<U, V>(a, strips, units, sums, first);
}
#endif

template <class U, int RT, int parts>
MST_INLINE void tile_of(int vectors, const float* a, const float* const* strips, int64_t units, float* const* sums,
                        bool first) {
  if (vectors == 3) return tile<U, RT, 3, parts>(a, strips, units, sums, first);
  if (vectors == 2) return tile<U, RT, 2, parts>(a, strips, units, sums, first);
  tile<U, RT, 1, parts>(a, strips, units, sums, first);
}

// ---- the loops -----------------------------------------------------------------------------------------------------

template <class U, int B, class E, class O> struct Worker : Pieces {
  static constexpr int RT = Tiling<B>::RT, SW = Tiling<B>::SW, parts = Tiling<B>::parts;
  static constexpr bool fours = L == 16 && B == 4;
  const E *const a = static_cast<const E*>(p.a), *const b = static_cast<const E*>(p.b);
  O* const out = static_cast<O*>(p.out);
  float *pa = nullptr, *pb = nullptr;
  int64_t chunk = 0, stride_a = 0, stride_b = 0;

  Worker(const Problem& problem, Part mine) : Pieces{problem, mine} {}

#if defined(MST_AVX512)
  // What block_row does, with blocks of 4.
  void row_of_fours(int64_t i, int64_t at, int64_t j0, int64_t j1, const float* a_strip, int64_t units, bool first) {
    const Range in_part = active(p, i, part.j0, part.j1), range = active(p, i, j0, j1);
    float* block_sums = sums + (at + range.begin - in_part.begin) * B * B;
    for (int64_t q = range.begin; q < range.end; q += 6) {
      const int blocks = static_cast<int>(std::min<int64_t>(6, range.end - q));
      const float* strips[6];
      float* to[6];
      for (int k = 0; k < blocks; k++) {
        strips[k] = pb + (p.lists.idx[q + k] - j0) * stride_b;
        to[k] = block_sums + (q - range.begin + k) * B * B;
      }
      tiles_of_fours<U>(blocks, a_strip, strips, units, to, first);
    }
  }
#endif

  // All active strips of block row i within block columns [j0, j1).
  void block_row(int64_t i, int64_t at, int64_t j0, int64_t j1, const float* a_strips, int64_t units, bool first) {
    constexpr int per_block = B / SW, group = S * parts;
    float trash[RT * SW] = {};
    const Range in_part = active(p, i, part.j0, part.j1), range = active(p, i, j0, j1);
    const int64_t n = (range.end - range.begin) * per_block;
    float* block_sums = sums + (at + range.begin - in_part.begin) * B * B;
    for (int64_t s = 0; s < n; s += group) {
      const int filled = static_cast<int>(std::min<int64_t>(group, n - s)), vectors = (filled + parts - 1) / parts;
      const float* strips[group];
      float* to[group];
      for (int k = 0; k < group; k++) {
        const int64_t q = s + std::min(k, filled - 1), block = q / per_block, strip = q % per_block;
        strips[k] = pb + ((p.lists.idx[range.begin + block] - j0) * per_block + strip) * stride_b;
        to[k] = block_sums + block * B * B + strip * B * SW;
      }
      for (int r = 0; r < B / RT; r++) {
        float* sums_r[group];
        for (int k = 0; k < group; k++) sums_r[k] = k < filled ? to[k] + r * RT * SW : trash;
        tile_of<U, RT, parts>(vectors, a_strips + r * stride_a, strips, units, sums_r, first);
      }
    }
  }

  // Adds the products of all tokens to the sums of block rows [i0, i1).
  void accumulate(int64_t i0, int64_t i1, bool sum_a, bool sum_b) {
    constexpr int64_t panel = panel_units * U::per_unit;
    for (int64_t m0 = 0; m0 < p.m; m0 += panel) {
      const int64_t tokens = std::min(panel, p.m - m0), units = ceil_div(tokens, U::per_unit);
      pack<U, RT>(a + m0 * p.lda, p.lda, tokens, i0 * B, p.rows, (i1 - i0) * (B / RT), stride_a, pa,
                         sum_a ? p.colsum + i0 * B : nullptr);
      for (int64_t j0 = part.j0; j0 < part.j1; j0 += chunk) {
        const int64_t j1 = std::min(part.j1, j0 + chunk);
        pack<U, SW>(b + m0 * p.ldb, p.ldb, tokens, j0 * B, p.cols, (j1 - j0) * (B / SW), stride_b, pb,
                           sum_b ? p.colsum + j0 * B : nullptr);
        for (int64_t i = i0; i < i1; i++) {
          const float* a_strips = pa + (i - i0) * (B / RT) * stride_a;
#if defined(MST_AVX512)
          if constexpr (fours) {
            row_of_fours(i, slot[i - i0], j0, j1, a_strips, units, m0 == 0);
            continue;
          }
#endif
          block_row(i, slot[i - i0], j0, j1, a_strips, units, m0 == 0);
        }
      }
    }
  }

  // Writes block rows [i0, i1) of out, columns of the part.
  void write(int64_t i0, int64_t i1) const {
    const int64_t c_end = std::min(p.cols, part.j1 * B);
    for (int64_t i = i0; i < i1; i++) {
      const Range range = active(p, i, part.j0, part.j1);
      for (int64_t r = 0; r < B && i * B + r < p.rows; r++) {
        O* row = out + (i * B + r) * p.ldo;
        const float* from = sums + slot[i - i0] * B * B + r * SW;  // [strip][row][SW]: row strips of RT follow on
        int64_t done = part.j0 * B;
        for (int64_t q = range.begin; q < range.end; q++, from += B * B) {
          const int64_t c = static_cast<int64_t>(p.lists.idx[q]) * B;
          if (c > done) memset(static_cast<void*>(row + done), 0, (c - done) * sizeof(O));
          for (int s = 0; s < B / SW && c + s * SW < p.cols; s++) {
            if (c + (s + 1) * SW <= p.cols)
              convert(from + s * B * SW, row + c + s * SW, SW);
            else
              convert(from + s * B * SW, row + c + s * SW, static_cast<int>(p.cols - c - s * SW));
          }
          done = c + B;
        }
        if (c_end > done) memset(static_cast<void*>(row + done), 0, (c_end - done) * sizeof(O));
      }
    }
  }

  int run() {
    static thread_local Scratch panel_memory;
    constexpr int64_t unit_bytes = panel_units * B * 4;
    // The paddings keep the strips of one row of a tile in different cache sets.
    stride_a = panel_units * RT + 16;
    stride_b = panel_units * SW + 16;
    chunk = std::max<int64_t>(1, std::min(part.j1 - part.j0, chunk_bytes / unit_bytes));
    chunk = ceil_div(part.j1 - part.j0, std::max<int64_t>(1, ceil_div(part.j1 - part.j0, chunk)));
    const int status = each([&](int64_t i0, int64_t i1, int64_t blocks, bool sum_a, bool sum_b) {
      const int64_t size_a = (i1 - i0) * (B / RT) * stride_a, size_b = chunk * (B / SW) * stride_b;
      pa = panel_memory.floats(size_a + size_b);
      if (!pa) return false;
      pb = pa + size_a;
      if (p.m == 0) memset(sums, 0, blocks * B * B * 4);
      if (blocks || sum_a || sum_b) accumulate(i0, i1, sum_a, sum_b);
      write(i0, i1);
      return true;
    });
    panel_memory.trim();
    return status;
  }
};

}  // namespace
}  // namespace mst

using namespace mst;

MST_API int mst_grad_weight(const MstGradWeight* arguments) {
  return by_block(arguments->block, [&](auto block) {
    if constexpr (block < 4)
      return grad_weight_fine(*arguments);
    else
      return by_gradient(arguments->in_dtype, arguments->out_dtype, [&](auto in, auto out) {
        using E = typename decltype(in)::type;
        return run_parts<Worker<typename UnitOf<E>::type, block, E, typename decltype(out)::type>>(Problem(*arguments));
      });
  });
}
