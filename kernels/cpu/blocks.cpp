// Passes over a whole weight, bound by memory: each row is read or written once, in order.
//
//     for each block row (threads), each row in it, each block column: zero, or sum of squares
#include "common.h"

using namespace mst;

MST_API int mst_zero_inactive(const MstZeroInactive* arguments) {
  const MstZeroInactive& a = *arguments;
  if (a.element_size < 1) return MST_BAD_DTYPE;
  if (a.block < 1) return MST_BAD_BLOCK;
  const int64_t size = a.element_size, block = a.block;
  const Lists lists = by_rows(a.index, ceil_div(a.rows, block));
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t r = 0; r < a.rows; r++) {
    char* row = static_cast<char*>(a.w) + r * a.ldw * size;
    int64_t done = 0;  // columns before this one are settled
    for (int32_t p = lists.ptr[r / block]; p < lists.ptr[r / block + 1]; p++) {
      const int64_t at = lists.idx[p] * block;
      if (at > done) memset(row + done * size, 0, (at - done) * size);
      done = at + block;
    }
    if (a.cols > done) memset(row + done * size, 0, (a.cols - done) * size);
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

template <class E> static int block_sumsq(const MstBlockSumsq& a) {
  const E* w = static_cast<const E*>(a.w);
  const int64_t R = ceil_div(a.rows, a.block), C = ceil_div(a.cols, a.block), block = a.block;
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t i = 0; i < R; i++) {
    const int64_t r1 = std::min(a.rows, (i + 1) * block);
    if (block < 4) {  // too short for lanes
      std::fill_n(a.out + i * C, C, 0.0f);
      for (int64_t r = i * block; r < r1; r++)
        for (int64_t j = 0; j < C; j++)
          for (int64_t c = j * block; c < std::min(a.cols, (j + 1) * block); c++) {
            const float x = to_float(w[r * a.ldw + c]);
            a.out[i * C + j] += x * x;
          }
      continue;
    }
    for (int64_t j = 0; j < C; j++) {
      float lanes[16] = {0};
      const int64_t c0 = j * block, n = std::min(block, a.cols - c0);
      for (int64_t r = i * block; r < r1; r++) add_squares(w + r * a.ldw + c0, n, lanes);
      float sum = 0;
      for (float lane : lanes) sum += lane;
      a.out[i * C + j] = sum;
    }
  }
  return MST_OK;
}

MST_API int mst_block_sumsq(const MstBlockSumsq* arguments) {
  if (arguments->block < 1) return MST_BAD_BLOCK;
  return by_dtype(arguments->dtype, [&](auto e) { return block_sumsq<typename decltype(e)::type>(*arguments); });
}
