// Passes over a whole weight, bound by memory: each row is read or written once, in order.
//
//     for each block row (threads), each row in it, each block column: zero, or sum of squares
#include "common.h"

using namespace mst;

MST_API int mst_zero_inactive(int element_size, int block, void* w, int64_t ldw, int64_t rows, int64_t cols,
                              const int32_t* index, int threads) {
  if (element_size != 2 && element_size != 4) return MST_BAD_DTYPE;
  if (block < 1) return MST_BAD_BLOCK;
  const int64_t R = ceil_div(rows, block), size = element_size;
  const Lists lists = by_rows(index, R);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t r = 0; r < rows; r++) {
    char* row = static_cast<char*>(w) + r * ldw * size;
    int64_t done = 0;  // columns before this one are settled
    for (int32_t p = lists.ptr[r / block]; p < lists.ptr[r / block + 1]; p++) {
      const int64_t at = static_cast<int64_t>(lists.idx[p]) * block;
      if (at > done) memset(row + done * size, 0, (at - done) * size);
      done = at + block;
    }
    if (cols > done) memset(row + done * size, 0, (cols - done) * size);
  }
  return MST_OK;
}

// Lanes of partial sums per block, so that the compiler vectorises the sum without reassociating it.
template <class E> static MST_INLINE void add_squares(const E* row, int64_t n, float (&lanes)[16]) {
  int64_t c = 0;
  for (; c + 16 <= n; c += 16)
    for (int i = 0; i < 16; i++) {
      const float x = to_float(row[c + i]);
      lanes[i] += x * x;
    }
  for (int i = 0; c < n; c++, i++) {
    const float x = to_float(row[c]);
    lanes[i] += x * x;
  }
}

template <class E>
static void block_sumsq(int block, const E* w, int64_t ldw, int64_t rows, int64_t cols, float* out, int threads) {
  const int64_t R = ceil_div(rows, block), C = ceil_div(cols, block);
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < R; i++) {
    const int64_t r1 = std::min(rows, (i + 1) * block);
    for (int64_t j = 0; j < C; j++) {
      float lanes[16] = {0};
      const int64_t c0 = j * block, n = std::min<int64_t>(block, cols - c0);
      for (int64_t r = i * block; r < r1; r++) add_squares(w + r * ldw + c0, n, lanes);
      float sum = 0;
      for (float lane : lanes) sum += lane;
      out[i * C + j] = sum;
    }
  }
}

MST_API int mst_block_sumsq(int dtype, int block, const void* w, int64_t ldw, int64_t rows, int64_t cols, float* out,
                            int threads) {
  if (block < 1) return MST_BAD_BLOCK;
  if (dtype == MST_F32)
    block_sumsq(block, static_cast<const float*>(w), ldw, rows, cols, out, threads);
  else if (dtype == MST_BF16)
    block_sumsq(block, static_cast<const bf16*>(w), ldw, rows, cols, out, threads);
  else
    return MST_BAD_DTYPE;
  return MST_OK;
}
