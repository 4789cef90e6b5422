// Packing activations with SIMD along tokens.
#pragma once
#include "common.h"

namespace mst {
namespace {

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

// Lines that a reduction takes apart from each other, two tokens a lane: to[k][MV * L] = element k0 + k of each token of a
// tile, of a vector's 2 L tokens t in the low half of lane t and L + t in the high one. Zero beyond the width and past the
// last token. Writes whole multiples of 2 L lines.
template <int MV> void pack_lines([[maybe_unused]] const bf16* x, [[maybe_unused]] int64_t ldx, int64_t tokens,
                                  [[maybe_unused]] int64_t width, [[maybe_unused]] int64_t k0, int64_t lines,
                                  [[maybe_unused]] float* to) {
#if defined(MST_BF16_PAIRS)
  for (int v = 0; v < MV; v++) {
    const bf16* rows[2][L];
    __mmask32 has = 0;  // of the halves of lanes
    for (int t = 0; t < 2 * L; t++) {
      rows[t / L][t % L] = x + std::min<int64_t>(v * 2 * L + t, tokens - 1) * ldx + k0;
      if (v * 2 * L + t < tokens) has |= __mmask32{1} << (2 * (t % L) + t / L);
    }
    for (int64_t k = 0; k < lines; k += 2 * L) {
      const int64_t left = width - k0 - k;
      alignas(64) float part[2][L * L];
      for (int h = 0; h < 2; h++) {
        bf16 edge[L][2 * L];
        const bf16* from[L];
        for (int i = 0; i < L; i++) {
          from[i] = rows[h][i] + k;
          if (left >= 2 * L) continue;
          memset(static_cast<void*>(edge[i]), 0, sizeof edge[i]);
          if (left > 0) memcpy(static_cast<void*>(edge[i]), from[i], left * sizeof(bf16));
          from[i] = edge[i];
        }
        transpose_units<Bf16Pair>(from, part[h], L);
      }
      for (int u = 0; u < L; u++) {
        const __m512i a = (__m512i)load(part[0] + u * L), b = (__m512i)load(part[1] + u * L);
        float* line = to + ((k + 2 * u) * MV + v) * L;
        _mm512_storeu_si512(line, _mm512_maskz_mov_epi16(
            has, _mm512_mask_blend_epi16(0xaaaaaaaa, a, _mm512_slli_epi32(b, 16))));
        _mm512_storeu_si512(line + MV * L, _mm512_maskz_mov_epi16(
            has, _mm512_mask_blend_epi16(0xaaaaaaaa, _mm512_srli_epi32(a, 16), b)));
      }
    }
  }
#endif
}

}  // namespace
}  // namespace mst
