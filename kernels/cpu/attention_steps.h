// Which keys a tile of queries attends to, as a short list of steps. Pure functions of positions.
//
// Every part (abi.h) is one of three kinds, and a query sees one interval of it:
//
//     RUN       consecutive keys: the window or the chunk
//     SUMMARY   consecutive entries of the list of summary keys (positions summary - 1, 2 summary - 1, ...)
//     ROWWISE   query i and the keys i - first - n step, for consecutive n
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
  const MstParts parts;
  const int64_t length;

  explicit Geometry(const MstAttention& p) : parts(p.parts), length(p.length) {}

  bool has(Kind kind) const {
    return kind == SUMMARY ? parts.summary : kind == ROWWISE ? parts.step : parts.window + parts.chunk;
  }
  int64_t summaries() const { return has(SUMMARY) ? length / parts.summary : 0; }
  // Where the n-th distance of query i leads; negative if there is no such key.
  int64_t at_distance(int64_t i, int64_t n) const { return i - parts.first - n * parts.step; }

  // What query i sees of a part that there is, if it sees anything. Both ends grow with i.
  Interval seen(Kind kind, int64_t i) const {
    if (kind == SUMMARY) return {0, i / parts.summary};
    if (kind == ROWWISE) return {0, i < parts.first ? 0 : (i - parts.first) / parts.step + 1};
    if (parts.chunk) return {i - i % parts.chunk, i + 1};
    return {std::max<int64_t>(0, i - parts.window + 1), i + 1};
  }

  // The steps of queries [i0, i1).
  void steps(int64_t i0, int64_t i1, std::vector<Step>& list) const {
    list.clear();
    if (has(RUN)) cut(RUN, i0, i1, KT, list);
    if (has(SUMMARY)) cut(SUMMARY, i0, i1, KT, list);
    if (has(ROWWISE)) cut(ROWWISE, i0, i1, L, list);
  }

 private:
  void cut(Kind kind, int64_t i0, int64_t i1, int unit, std::vector<Step>& list) const {
    const Interval low = seen(kind, i0), high = seen(kind, i1 - 1);
    for (int64_t at = low.begin / KT * KT; at < high.end; at += step_keys) {
      const int width = static_cast<int>(std::min<int64_t>(step_keys, ceil_div(high.end - at, unit) * unit));
      const bool whole = kind != ROWWISE && high.begin <= at && low.end >= at + width;
      list.push_back({kind, at, width, !whole});
    }
  }
};

}  // namespace
}  // namespace mst
