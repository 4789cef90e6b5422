// What the kernels share: the packed index, dispatch over the table, memory, threads.
#pragma once
#include <algorithm>
#include <cstdlib>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "abi.h"
#include "layout.h"
#include "transpose.h"

namespace mst {

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the packed index ----------------------------------------------------------------------------------------------

// One orientation of the packed index: block row (CSR) or block column (CSC) i holds the positions
// [ptr[i], ptr[i + 1]) and idx names the other coordinate, ascending.
struct Lists {
  const int32_t* ptr;
  const int32_t* idx;
};

static inline Lists by_rows(const int32_t* index, int64_t R) {
  return {index + MST_HEADER, index + MST_HEADER + R + 1};
}
static inline Lists by_cols(const int32_t* index, int64_t R, int64_t C) {
  const int32_t* col_ptr = index + MST_HEADER + R + 1 + R * C;
  return {col_ptr, col_ptr + C + 1};
}

// ---- dispatch ------------------------------------------------------------------------------------------------------

// Each calls body with what an entry of table.py stands for, or returns that there is no such entry.

template <class T> struct Type {
  using type = T;
};

template <class Body> int by_dtype(int code, Body body) {
#define MST_CASE(c, E) \
  if (code == c) return body(Type<E>{});
  MST_DTYPES(MST_CASE)
#undef MST_CASE
  return MST_BAD_DTYPE;
}

#define MST_CASE(code1, E1, code2, E2) \
  if (first == code1 && second == code2) return body(Type<E1>{}, Type<E2>{});
template <class Body> int by_product(int first, int second, Body body) {
  MST_PRODUCTS(MST_CASE)
  return MST_BAD_DTYPE;
}
template <class Body> int by_gradient(int first, int second, Body body) {
  MST_GRADIENTS(MST_CASE)
  return MST_BAD_DTYPE;
}
#undef MST_CASE

template <class Body> int by_block(int block, Body body) {
#define MST_CASE(B) \
  if (block == B) return body(std::integral_constant<int, B>{});
  MST_BLOCKS(MST_CASE)
#undef MST_CASE
  return MST_BAD_BLOCK;
}

#define MST_CASE(B) B,
constexpr int largest_block = std::max({MST_BLOCKS(MST_CASE)});
#undef MST_CASE

// ---- memory --------------------------------------------------------------------------------------------------------

// Runs body, in which nothing is thrown but by allocations; false if one failed. No exception may leave a loop of
// threads, nor the library.
template <class Body> bool within_memory(Body body) noexcept {
  try {
    body();
    return true;
  } catch (...) {
    return false;
  }
}

// A thread's scratch memory. It grows and is kept between calls, because fresh pages cost more than small layers do;
// all kernels work in pieces of bounded size, and what exceeds the bound for once is given back by trim().
class Scratch {
 public:
  ~Scratch() { free(data_); }
  float* floats(size_t n) {
    const size_t bytes = (n * sizeof(float) + 4095) / 4096 * 4096;
    if (bytes > size_) {
      free(data_);
      data_ = aligned_alloc(4096, bytes);
      size_ = data_ ? bytes : 0;
    }
    return static_cast<float*>(data_);
  }
  void trim() {
    if (size_ <= keep) return;
    free(data_);
    data_ = nullptr;
    size_ = 0;
  }

 private:
  static constexpr size_t keep = 12 << 20;
  void* data_ = nullptr;
  size_t size_ = 0;
};

// ---- threads -------------------------------------------------------------------------------------------------------

static inline int team_size() {
#if defined(_OPENMP)
  return omp_get_num_threads();
#else
  return 1;
#endif
}
static inline int team_rank() {
#if defined(_OPENMP)
  return omp_get_thread_num();
#else
  return 0;
#endif
}

}  // namespace mst
