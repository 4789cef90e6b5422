// Which keys a tile of queries attends to, as a short list of steps. Pure functions of positions.
//
// A pattern is a union of parts that no key is in twice, and every part is one of three kinds:
//
//     RUN       consecutive keys: all of `full`, the window of `local` and `sparse`, the own chunk of `fixed`, `blocks`
//     SUMMARY   consecutive entries of the list of summary keys (positions stride - 1, 2 stride - 1, ...): `fixed`
//     ROWWISE   query i and the keys i - n stride, for consecutive n: `strided`, and beyond the window `sparse`
//
// In each part a query sees one interval of keys, of summaries or of n. `blocks` alone cuts further.
#pragma once
#include <vector>

#include "common.h"

namespace mst {
namespace {

constexpr int QT = 32;           // queries of a tile
constexpr int KT = 32;           // keys of a packed tile: what a step is a multiple of
constexpr int step_keys = 128;   // most keys of a step

enum Kind { RUN, SUMMARY, ROWWISE };

struct Step {
  Kind kind;
  int64_t first;  // key, summary or n; a multiple of KT but for ROWWISE
  int width;      // a multiple of KT, for ROWWISE of L
  bool masked;    // whether some query does not see all of it
};

struct Interval {
  int64_t begin, end;
};

struct Geometry {
  int pattern;
  int64_t length, window, stride, chunks;
  const uint8_t* blocks;

  explicit Geometry(const MstAttention& p)
      : pattern(p.pattern), length(p.length), window(p.window), stride(p.stride),
        chunks(ceil_div(p.length, p.stride)), blocks(p.blocks) {}

  bool rowwise() const { return pattern == MST_STRIDED || pattern == MST_SPARSE; }
  int64_t summaries() const { return pattern == MST_FIXED ? length / stride : 0; }
  // The first n that the window does not hold already.
  int64_t first_n() const { return pattern == MST_SPARSE ? ceil_div(window, stride) : 0; }

  // What query i sees of a part, if it sees anything. Both ends grow with i.
  Interval seen(Kind kind, int64_t i) const {
    if (kind == SUMMARY) return {0, i / stride};
    if (kind == ROWWISE) return {first_n(), i / stride + 1};
    if (pattern == MST_LOCAL || pattern == MST_SPARSE) return {std::max<int64_t>(0, i - window + 1), i + 1};
    if (pattern == MST_FIXED) return {i - i % stride, i + 1};
    return {0, i + 1};
  }

  // The steps of queries [i0, i1).
  void steps(int64_t i0, int64_t i1, std::vector<Step>& list) const {
    list.clear();
    if (pattern == MST_BLOCKS) return block_steps(i0, i1, list);
    if (pattern != MST_STRIDED) cut(RUN, i0, i1, KT, list);
    if (pattern == MST_FIXED) cut(SUMMARY, i0, i1, KT, list);
    if (rowwise()) cut(ROWWISE, i0, i1, L, list);
  }

 private:
  void cut(Kind kind, int64_t i0, int64_t i1, int unit, std::vector<Step>& list) const {
    const Interval low = seen(kind, i0), high = seen(kind, i1 - 1);
    const int64_t end = high.end;
    for (int64_t at = kind == ROWWISE ? low.begin : low.begin / KT * KT; at < end; at += step_keys) {
      const int width = static_cast<int>(std::min<int64_t>(step_keys, ceil_div(end - at, unit) * unit));
      const bool whole = kind != ROWWISE && high.begin <= at && low.end >= at + width;
      list.push_back({kind, at, width, !whole});
    }
  }

  // Which of "some" (bit 0) and "all" (bit 1) of keys [k, k + KT) the blocks of queries [i0, i1) allow.
  int allowed(int64_t i0, int64_t i1, int64_t k) const {
    bool some = false, all = true;
    const int64_t k_end = std::min(k + KT, i1);
    for (int64_t a = i0 / stride; a <= (i1 - 1) / stride; a++)
      for (int64_t b = k / stride; b <= (k_end - 1) / stride; b++) {
        some |= blocks[a * chunks + b] != 0;
        all &= blocks[a * chunks + b] != 0;
      }
    return some | all << 1;
  }

  void block_steps(int64_t i0, int64_t i1, std::vector<Step>& list) const {
    for (int64_t k = 0; k < i1; k += KT) {
      const int what = allowed(i0, i1, k);
      if (!(what & 1)) continue;
      const bool masked = !(what & 2) || k + KT > i0 + 1;
      Step* last = list.empty() ? nullptr : &list.back();
      if (last && last->first + last->width == k && last->width < step_keys && last->masked == masked)
        last->width += KT;
      else
        list.push_back({RUN, k, KT, masked});
    }
  }
};

}  // namespace
}  // namespace mst
