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

// Cuts a part into pieces of its block rows, so that their sums fit in piece_bytes.
struct Pieces {
  const Problem& p;
  const Part part;
  std::vector<int64_t> slot = {};  // block row i of a piece has its sums from block slot[i - begin] of `sums` on
  float* sums = nullptr;

  // body(i0, i1, blocks, sum_a, sum_b), for block rows [i0, i1) with so many active blocks, computes and writes them,
  // adds up the columns of a or b if asked, and says whether it got memory.
  template <class Body> int each(Body body) {
    static thread_local Scratch memory;
    if (part.j1 == part.j0) return MST_OK;
    const int64_t block_floats = static_cast<int64_t>(p.block) * p.block;
    const bool sum_a = p.colsum && p.colsum_of_a && part.sums_a(), sum_b = p.colsum && !p.colsum_of_a && part.sums_b();
    for (int64_t i0 = part.i0, i1; i0 < part.i1; i0 = i1) {
      slot.clear();
      int64_t blocks = 0;
      for (i1 = i0; i1 < part.i1; i1++) {
        const Range range = active(p, i1, part.j0, part.j1);
        if (i1 > i0 && (blocks + range.end - range.begin) * block_floats * 4 > piece_bytes) break;
        slot.push_back(blocks);
        blocks += range.end - range.begin;
      }
      sums = memory.floats(blocks * block_floats + 64);
      if (!sums || !body(i0, i1, blocks, sum_a, sum_b && i0 == part.i0)) return MST_NO_MEMORY;
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
