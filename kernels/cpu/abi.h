// C ABI of the CPU kernels.
//
// A weight W is stored as [rows, cols], row-major with leading dimension ldw, under a grid of R x C blocks of
// block x block elements, block one of table.py; the last block row and column may be partial. Matrices of
// tokens are [m, width], row-major; every leading dimension counts elements and may exceed the width. `index` is the
// packed int32 index:
//
//     [0] active blocks n   [1] dense gradient   [2] changes   [3..7] reserved
//     row_ptr[R + 1], col_idx[R * C]    CSR order, columns ascending, the first n of col_idx in use
//     col_ptr[C + 1], row_idx[R * C]    CSC order, rows ascending, the first n of row_idx in use
//
// A dtype is a code of table.py. Every function takes one struct and returns 0, or a negative number: for an argument it
// does not support (nothing is written then), or because memory ran out. Nothing is thrown. Results do not depend on the
// number of threads. Functions may be called from several threads at once.
//
// abi.py has the same structs; a library is not built where they differ.
#pragma once
#include <cstdint>

#define MST_API extern "C" __attribute__((visibility("default")))

enum { MST_HEADER = 8 };
enum MstError { MST_OK = 0, MST_BAD_BLOCK = -1, MST_BAD_DTYPE = -2, MST_NO_MEMORY = -3, MST_BAD_SHAPE = -4 };

// outputs_are_rows = 1: y[m, rows] = x[m, cols] . W^T + bias; 0: y[m, cols] = x[m, rows] . W + bias.
// y has x's dtype. A W of another dtype is rounded to x's, block by block. bias may be null.
struct MstSpmm {
  const void* x;
  int64_t ldx;
  const void* w;
  int64_t ldw, rows, cols;
  const int32_t* index;
  const void* bias;
  void* y;
  int64_t ldy, m;
  int32_t x_dtype, w_dtype, bias_dtype, block, outputs_are_rows, threads;
};
MST_API int mst_spmm(const MstSpmm* arguments);

// What mst_spmm does with each of `count` products, whose results do not overlap; on `threads` threads all together,
// whatever the products say. Where one is refused others may have been written.
struct MstSpmmGroups {
  const MstSpmm* products;
  int64_t count;
  int32_t threads;
};
MST_API int mst_spmm_groups(const MstSpmmGroups* arguments);

// y[m, outputs] = x[m, reduction] . W^T + bias, of a W [outputs, reduction] whose active blocks were packed; see
// spmm_packed.cpp and mst_compile/blocks/packed.py. `index`: row_ptr[R + 1], then col_idx in CSR order. x, w and y have
// one dtype; block is a power of two.
enum { MST_PACKED_LARGEST = 128 };
struct MstPacked {
  const void* x;
  int64_t ldx;
  const void* w;
  const int32_t* index;
  const void* bias;
  void* y;
  int64_t ldy, m, outputs, reduction;
  int32_t dtype, bias_dtype, block, threads;
};
MST_API int mst_packed(const MstPacked* arguments);

// out[r, c] = sum over tokens of a[m, r] . b[m, c] on the active blocks, 0 elsewhere.
// a and b share in_dtype. colsum, if not null, is a float array that receives the sum over tokens of a (colsum_of_a = 1,
// length rows) or b (0, length cols): the gradient of a bias.
struct MstGradWeight {
  const void* a;
  int64_t lda;
  const void* b;
  int64_t ldb, m, rows, cols;
  const int32_t* index;
  void* out;
  int64_t ldo;
  float* colsum;
  int32_t in_dtype, out_dtype, block, colsum_of_a, threads;
};
MST_API int mst_grad_weight(const MstGradWeight* arguments);

// The same of many gradients, as of many products above.
struct MstGradWeightGroups {
  const MstGradWeight* products;
  int64_t count;
  int32_t threads;
};
MST_API int mst_grad_weight_groups(const MstGradWeightGroups* arguments);

// Sets the inactive blocks of w to zero.
struct MstZeroInactive {
  void* w;
  int64_t ldw, rows, cols;
  const int32_t* index;
  int32_t element_size, block, threads;  // bytes of an element
};
MST_API int mst_zero_inactive(const MstZeroInactive* arguments);

// out[R, C] = sum of squares of each block of w.
struct MstBlockSumsq {
  const void* w;
  int64_t ldw, rows, cols;
  float* out;
  int32_t dtype, block, threads;
};
MST_API int mst_block_sumsq(const MstBlockSumsq* arguments);

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
