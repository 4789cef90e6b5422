// What the weight gradients share: how W is split among threads, how a part is cut, how its sums are written out.
#pragma once
#include <vector>

#include "common.h"

namespace mst {

int grad_weight_fine(const MstGradWeight& a);  // mst_grad_weight for blocks of less than 4

namespace {

constexpr int64_t piece_bytes = 8 << 20;  // of sums

// One call.
struct Problem : MstGradWeight {
  int64_t R, C;
  Lists lists;

  explicit Problem(const MstGradWeight& arguments)
      : MstGradWeight(arguments), R(ceil_div(rows, block)), C(ceil_div(cols, block)), lists(by_rows(index, R)) {}
};

// ---- parts of W ----------------------------------------------------------------------------------------------------

// Block rows [i0, i1) and block columns [j0, j1): what one thread owns.
struct Part {
  int64_t i0, i1, j0, j1;
  // Exactly one part of each block column sums b's columns, one of each block row a's.
  bool sums_b() const { return i0 == 0 && i1 > 0; }
  bool sums_a() const { return j0 == 0 && j1 > 0; }
};

// Where the running count `at(i)` reaches `target`.
template <class At> int64_t cut(int64_t n, int64_t target, At at) {
  int64_t lo = 0, hi = n;
  while (lo < hi) {
    const int64_t mid = (lo + hi) / 2;
    if (at(mid) < target) lo = mid + 1; else hi = mid;
  }
  return lo;
}

// Splits W into `team` parts of about equally many active blocks: first by rows, then each by columns. The factors
// are those that pack the fewest columns of a and b per thread.
Part part_of(const Problem& p, int team, int rank) {
  int by_row = team;
  for (int f = 1; f <= team; f++)
    if (team % f == 0 && p.rows / f + p.cols * f / team < p.rows / by_row + p.cols * by_row / team) by_row = f;
  const int by_col = team / by_row, tr = rank / by_col, tc = rank % by_col;
  const int32_t* ptr = p.lists.ptr;
  const auto row_cut = [&](int k) {
    return k == by_row ? p.R : cut(p.R, static_cast<int64_t>(ptr[p.R]) * k / by_row, [&](int64_t i) { return ptr[i]; });
  };
  Part part{tr ? row_cut(tr) : 0, row_cut(tr + 1), 0, p.C};
  if (by_col == 1) return part;
  std::vector<int64_t> before(p.C + 1, 0);
  for (int32_t q = ptr[part.i0]; q < ptr[part.i1]; q++) before[p.lists.idx[q] + 1]++;
  for (int64_t j = 0; j < p.C; j++) before[j + 1] += before[j];
  const auto col_cut = [&](int k) {
    return k == by_col ? p.C : cut(p.C, before[p.C] * k / by_col, [&](int64_t j) { return before[j]; });
  };
  part.j0 = tc ? col_cut(tc) : 0;
  part.j1 = col_cut(tc + 1);
  return part;
}

// The active positions of block row i with block columns in [j0, j1).
struct Range {
  int64_t begin, end;
};
MST_INLINE Range active(const Problem& p, int64_t i, int64_t j0, int64_t j1) {
  const int32_t *idx = p.lists.idx, *b = idx + p.lists.ptr[i], *e = idx + p.lists.ptr[i + 1];
  if (j0 > 0) b = std::lower_bound(b, e, static_cast<int32_t>(j0));
  if (j1 < p.C) e = std::lower_bound(b, e, static_cast<int32_t>(j1));
  return {b - idx, e - idx};
}

// ---- sums ----------------------------------------------------------------------------------------------------------

// The sums of a part, piece by piece of its block rows: a block's strips of SW columns, [strip][row][SW] floats.
template <int B, int SW, class O> struct Sums {
  const Problem& p;
  const Part part;
  O* const out = static_cast<O*>(p.out);
  std::vector<int64_t> slot = {};  // block row i of the piece keeps its sums from slot[i - begin] on, B * B floats a block
  float* sums = nullptr;

  // Writes block rows [i0, i1) of out, columns of the part.
  void write(int64_t i0, int64_t i1) const {
    const int64_t c_end = std::min(p.cols, part.j1 * B);
    for (int64_t i = i0; i < i1; i++) {
      const Range range = active(p, i, part.j0, part.j1);
      for (int64_t r = 0; r < B && i * B + r < p.rows; r++) {
        O* row = out + (i * B + r) * p.ldo;
        const float* from = sums + slot[i - i0] * B * B + r * SW;
        int64_t done = part.j0 * B;
        if constexpr (B < 4) {  // so many gaps that one run of zeros is cheaper
          memset(static_cast<void*>(row + done), 0, (c_end - done) * sizeof(O));
          for (int64_t q = range.begin; q < range.end; q++, from += B * B)
            for (int64_t c = p.lists.idx[q] * B, k = 0; k < B && c + k < p.cols; k++) from_float(from[k], row + c + k);
          continue;
        }
        for (int64_t q = range.begin; q < range.end; q++, from += B * B) {
          const int64_t c = static_cast<int64_t>(p.lists.idx[q]) * B;
          if (c > done) memset(static_cast<void*>(row + done), 0, (c - done) * sizeof(O));
          for (int s = 0; s < B / SW && c + s * SW < p.cols; s++) {
            if (c + (s + 1) * SW <= p.cols)
              convert(from + s * B * SW, row + c + s * SW, SW);
            else
              convert(from + s * B * SW, row + c + s * SW, static_cast<int>(p.cols - c - s * SW));
          }
          done = c + B;
        }
        if (c_end > done) memset(static_cast<void*>(row + done), 0, (c_end - done) * sizeof(O));
      }
    }
  }

  // Computes and writes piece after piece; `accumulate(i0, i1, sum_a, sum_b)` fills the sums of block rows [i0, i1), says
  // whether it got memory, and adds up the columns of a or b if asked.
  template <class Accumulate> int by_piece(Accumulate accumulate) {
    static thread_local Scratch memory;
    if (part.j1 == part.j0) return MST_OK;
    const bool sum_a = p.colsum && p.colsum_of_a && part.sums_a(), sum_b = p.colsum && !p.colsum_of_a && part.sums_b();
    for (int64_t i0 = part.i0, i1; i0 < part.i1; i0 = i1) {
      slot.clear();
      int64_t blocks = 0;
      for (i1 = i0; i1 < part.i1; i1++) {
        const Range range = active(p, i1, part.j0, part.j1);
        if (i1 > i0 && (blocks + range.end - range.begin) * B * B * 4 > piece_bytes) break;
        slot.push_back(blocks);
        blocks += range.end - range.begin;
      }
      sums = memory.floats(blocks * B * B + 64);
      if (!sums) return MST_NO_MEMORY;
      if (p.m == 0 || B < 4) memset(sums, 0, blocks * B * B * 4);
      if ((blocks || sum_a || sum_b) && !accumulate(i0, i1, sum_a, sum_b && i0 == part.i0)) return MST_NO_MEMORY;
      write(i0, i1);
    }
    memory.trim();
    return MST_OK;
  }
};

// ---- threads -------------------------------------------------------------------------------------------------------

template <class Worker> int run_parts(const Problem& p) {
  int status = MST_OK;
  if (p.colsum) std::fill_n(p.colsum, p.colsum_of_a ? p.rows : p.cols, 0.0f);
#pragma omp parallel num_threads(std::max(1, p.threads))
  {
    int mine = MST_NO_MEMORY;
    within_memory([&] { mine = Worker(p, part_of(p, team_size(), team_rank())).run(); });
    if (mine != MST_OK) {
#pragma omp atomic write
      status = mine;
    }
  }
  return status;
}

}  // namespace
}  // namespace mst
