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

}  // namespace
}  // namespace mst
