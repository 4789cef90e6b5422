// C ABI of the CPU kernels.
//
// A weight W is stored as [rows, cols], row-major with leading dimension ldw, under a grid of R x C blocks of
// block x block elements, block in {4, 8, 16, 32, 64}; the last block row and column may be partial. Matrices of
// tokens are [m, width], row-major; every leading dimension counts elements and may exceed the width. `index` is the
// packed int32 index:
//
//     [0] active blocks n   [1] dense gradient   [2] changes   [3..7] reserved
//     row_ptr[R + 1], col_idx[R * C]    CSR order, columns ascending, the first n of col_idx in use
//     col_ptr[C + 1], row_idx[R * C]    CSC order, rows ascending, the first n of row_idx in use
//
// Every function returns 0, or a negative number for an argument it does not support (nothing is written then).
// Results do not depend on the number of threads. Functions may be called from several threads at once.
#pragma once
#include <cstdint>

#define MST_API extern "C" __attribute__((visibility("default")))

enum { MST_HEADER = 8 };
enum MstDtype { MST_F32 = 0, MST_BF16 = 1 };
enum MstError { MST_OK = 0, MST_BAD_BLOCK = -1, MST_BAD_DTYPE = -2, MST_NO_MEMORY = -3, MST_BAD_SHAPE = -4 };

// outputs_are_rows = 1: y[m, rows] = x[m, cols] . W^T + bias; 0: y[m, cols] = x[m, rows] . W + bias.
// y has x's dtype. (x, w) may be (f32, f32), (bf16, bf16) or (bf16, f32): then active blocks of W are rounded to bf16.
// bias may be null.
MST_API int mst_spmm(int x_dtype, int w_dtype, int block, const void* x, int64_t ldx, const void* w, int64_t ldw,
                     int64_t rows, int64_t cols, const int32_t* index, int outputs_are_rows, const void* bias,
                     int bias_dtype, void* y, int64_t ldy, int64_t m, int threads);

// out[r, c] = sum over tokens of a[m, r] . b[m, c] on the active blocks, 0 elsewhere.
// a and b share in_dtype; out is f32 or bf16. colsum, if not null, is a float array that receives the sum over tokens
// of a (colsum_of_a = 1, length rows) or b (0, length cols): the gradient of a bias.
MST_API int mst_grad_weight(int in_dtype, int out_dtype, int block, const void* a, int64_t lda, const void* b,
                            int64_t ldb, int64_t m, int64_t rows, int64_t cols, const int32_t* index, void* out,
                            int64_t ldo, float* colsum, int colsum_of_a, int threads);

// Sets the inactive blocks of w to zero; element_size is 2 or 4 bytes.
MST_API int mst_zero_inactive(int element_size, int block, void* w, int64_t ldw, int64_t rows, int64_t cols,
                              const int32_t* index, int threads);

// out[R, C] = sum of squares of each block of w.
MST_API int mst_block_sumsq(int dtype, int block, const void* w, int64_t ldw, int64_t rows, int64_t cols, float* out,
                            int threads);

// ---- attention -----------------------------------------------------------------------------------------------------

// Which keys query i sees, none after it: a run of keys, keys at distances, summaries; 0 stands for no such part.
// No key may be in two parts; any that keep to this may be combined. Numbers do not exceed the length.
struct MstParts {
  int64_t window;              // a run: the last `window` keys, i included
  int64_t chunk;               // or a run: the keys of i's own chunk of `chunk` positions
  int64_t first, step;         // distances first, first + step, ...; `first` counts if there is a step
  int64_t summary;             // the last position of each chunk of `summary` positions before i's own
};

// A tensor [batch, heads, length, size]: unit stride along `size`, the others are given in elements.
struct MstHeads {
  void* data;
  int64_t batch, head, token;
};

// One attention. Query head h reads key head h / (heads / key_heads); heads must be a multiple of key_heads.
struct MstAttention {
  int64_t batch, heads, key_heads, length;
  int64_t size;                // of a head: a multiple of 8 in [8, 256]
  MstParts parts;
  int32_t dtype, threads;
  float scale;
  const uint8_t* key_mask;     // [batch, length], 0 for keys that no query sees; or null
  float* lse;                  // [batch, heads, length]
  MstHeads q, k, v, out;
  MstHeads grad, dq, dk, dv;   // of the backward pass
};

// out = softmax(scale q k^T, cut to the parts) v; lse = log of each softmax's denominator, -inf where there is no key.
MST_API int mst_attention(const MstAttention* problem);

// dq, dk, dv out of grad, q, k, v, out and lse.
MST_API int mst_attention_backward(const MstAttention* problem);
