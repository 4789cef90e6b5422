// The packed index, scratch memory and dispatch shared by the kernels.
#pragma once
#include <algorithm>
#include <cstdlib>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "abi.h"
#include "vector.h"

namespace mst {

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

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
