// Passes over a whole weight, bound by memory: each row is read or written once, in order.
//
//     for each block row (threads), each row in it, each block column: zero, or sum of squares
#include "common.h"

using namespace mst;

constexpr int64_t run_width = 8;   // elements: wider blocks leave no row with so many runs that it counts
constexpr int64_t run_bytes = 96;  // of a row that are masked in the time of a run, on a Zen 5

// Sets what lies between the active blocks of row r to zero, a run at a time.
static void zero_runs(const MstZeroInactive& a, const Lists& lists, int64_t r) {
  const int64_t size = a.element_size, block = a.block;
  char* row = static_cast<char*>(a.w) + r * a.ldw * size;
  int64_t done = 0;  // columns before this one are settled
  for (int32_t p = lists.ptr[r / block]; p < lists.ptr[r / block + 1]; p++) {
    const int64_t at = lists.idx[p] * block;
    if (at > done) memset(row + done * size, 0, (at - done) * size);
    done = at + block;
  }
  if (a.cols > done) memset(row + done * size, 0, (a.cols - done) * size);
}

// The same of all rows of block row i, which share a mask: in whole vectors where there are so many runs that these, each
// some nanoseconds and a branch that nobody foresees, would take longer. `Word` is as wide as an element. Compilers leave
// the loop over elements, which may be of any type, as it is: its vectors are written out.
typedef int32_t Bits __attribute__((vector_size(4 * L)));
template <class Word> static void zero_block_row(const MstZeroInactive& a, const Lists& lists, int64_t i) {
  typedef Word __attribute__((may_alias)) Element;
  static thread_local Scratch memory;
  const int64_t block = a.block, width = ceil_div(a.cols, block) * block, end = std::min(a.rows, (i + 1) * block);
  const int64_t runs = lists.ptr[i + 1] - lists.ptr[i], bytes = width * static_cast<int64_t>(sizeof(Word));
  Word* keep = runs * run_bytes > bytes ? reinterpret_cast<Word*>(memory.floats(ceil_div(bytes, 4))) : nullptr;
  if (!keep) {
    for (int64_t r = i * block; r < end; r++) zero_runs(a, lists, r);
    return;
  }
  memset(keep, 0, width * sizeof(Word));
  for (int32_t p = lists.ptr[i]; p < lists.ptr[i + 1]; p++)
    for (int64_t c = 0; c < block; c++) keep[lists.idx[p] * block + c] = static_cast<Word>(-1);
  constexpr int64_t lanes = 4 * L / sizeof(Word);
  for (int64_t r = i * block; r < end; r++) {
    Element* row = static_cast<Element*>(a.w) + r * a.ldw;
    int64_t c = 0;
    for (; c + lanes <= a.cols; c += lanes) {
      Bits some, kept;
      memcpy(&some, row + c, sizeof some);
      memcpy(&kept, keep + c, sizeof kept);
      some &= kept;
      memcpy(row + c, &some, sizeof some);
    }
    for (; c < a.cols; c++) row[c] &= keep[c];
  }
  memory.trim();
}

MST_API int mst_zero_inactive(const MstZeroInactive* arguments) {
  const MstZeroInactive& a = *arguments;
  if (a.element_size < 1) return MST_BAD_DTYPE;
  if (a.block < 1) return MST_BAD_BLOCK;
  const int64_t R = ceil_div(a.rows, a.block);
  const Lists lists = by_rows(a.index, R);
  const auto by_block_rows = [&](auto word) {
#pragma omp parallel for num_threads(a.threads) schedule(static)
    for (int64_t i = 0; i < R; i++) zero_block_row<decltype(word)>(a, lists, i);
    return MST_OK;
  };
  if (a.block < run_width) {  // or no row has as many
    if (a.element_size == 2) return by_block_rows(uint16_t{});
    if (a.element_size == 4) return by_block_rows(uint32_t{});
    if (a.element_size == 8) return by_block_rows(uint64_t{});
  }
#pragma omp parallel for num_threads(a.threads) schedule(static)
  for (int64_t r = 0; r < a.rows; r++) zero_runs(a, lists, r);
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
