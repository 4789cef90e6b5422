// A vector of L floats, and the few operations the kernels need on it.
//
// The kernels are written once over this header. GCC/clang vector extensions carry the arithmetic, with the width that
// table.py states (16 lanes with AVX-512, 8 with AVX, else 4), so AVX2, SSE and NEON come for free. Intrinsics appear
// only where the extensions give bad code: transposes, joining short vectors, and bf16 dot products.
#pragma once
#include <cstdint>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "table.h"

#define MST_INLINE inline __attribute__((always_inline))
#define MST_NOINLINE __attribute__((noinline))
#if defined(__clang__)
#define MST_UNROLL _Pragma("clang loop unroll(full)")
#define MST_SHUFFLE4(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define MST_UNROLL _Pragma("GCC unroll 64")
#define MST_SHUFFLE4(a, b, i, j, k, l) __builtin_shuffle(a, b, (v4i){i, j, k, l})
#endif

namespace mst {

constexpr int L = MST_LANES;

typedef float vf __attribute__((vector_size(4 * L)));
typedef float vf_mem __attribute__((vector_size(4 * L), aligned(4), may_alias));
typedef float v4f __attribute__((vector_size(16)));
typedef float v4f_mem __attribute__((vector_size(16), aligned(4), may_alias));
typedef int32_t v4i __attribute__((vector_size(16)));

static MST_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_mem*>(p); }
static MST_INLINE void store(float* p, vf v) { *reinterpret_cast<vf_mem*>(p) = v; }
static MST_INLINE vf broadcast(float x) { return x - vf{}; }
static MST_INLINE void prefetch(const void* p) { __builtin_prefetch(p, 0, 3); }

static MST_INLINE v4f load4(const float* p) { return *reinterpret_cast<const v4f_mem*>(p); }
static MST_INLINE void store4(float* p, v4f v) { *reinterpret_cast<v4f_mem*>(p) = v; }

// N floats, for N a power of two up to L.
template <int N> struct Floats {
  typedef float type __attribute__((vector_size(4 * N)));
  typedef float mem __attribute__((vector_size(4 * N), aligned(4), may_alias));
};
// N integers as wide as a float, and half as wide.
template <int N> struct Ints {
  typedef int32_t type __attribute__((vector_size(4 * N)));
  typedef uint16_t half __attribute__((vector_size(2 * N)));
};
template <int N> static MST_INLINE typename Floats<N>::type load_n(const float* p) {
  return *reinterpret_cast<const typename Floats<N>::mem*>(p);
}
template <int N> static MST_INLINE void store_n(float* p, typename Floats<N>::type v) {
  *reinterpret_cast<typename Floats<N>::mem*>(p) = v;
}

}  // namespace mst
