// The keys and values of one head, packed, and the scores of a tile of queries against a step of them.
#pragma once
#include <memory>
#include <new>

#include "attention_pack.h"

namespace mst {
namespace {

// How packed rows lie in memory: `width` numbers each, in tiles of KT rows that stand `tile` numbers apart. Queries that
// meet keys a multiple of the step away would meet them all in the same few cache sets if the step is a power of two;
// gaps between the tiles shift each such key by about a row.
struct Layout {
  int64_t width, tile;

  explicit Layout(const MstAttention& p) : width(ceil_div(p.size, L) * L), tile(KT * width) {
    if (p.parts.step && p.parts.step % KT == 0) tile += ceil_div(width * KT / p.parts.step, L) * L;
  }
  bool gaps() const { return tile != KT * width; }
  int64_t at(int64_t row) const { return row / KT * tile + row % KT * width; }
  // The distance of rows whose numbers differ by the step: there are gaps only where it is a multiple of KT.
  int64_t apart(int64_t step) const { return gaps() ? step / KT * tile : step * width; }
};

// Keys that steps count through: all of a head's, or its summaries, in the forms of attention_pack.h. Rows are padded
// with zeros, and so is their number to a multiple of KT.
template <class E> struct KeySet {
  using P = Packed<E>;
  using Number = typename P::number;
  int64_t padded = 0;
  float *kt = nullptr, *vt = nullptr;    // across, tile by tile
  float *kj = nullptr, *vj = nullptr;    // joined
  Number *k = nullptr, *v = nullptr;     // along
  float *dk = nullptr, *dv = nullptr;
  float* bias = nullptr;  // 0, or -inf for a key that is masked out; null without a mask

  // Units of a tile across: what a row holds, in whole vectors.
  static int64_t units(int64_t size) { return ceil_div(size, L * P::per_unit) * L; }

  // Takes what is wanted from `at` on, in floats; with at = 0 that counts them.
  template <class Pointer> void place(Pointer take, int64_t count, int64_t size, const Layout& layout, bool backward,
                                      bool rows, bool mask) {
    padded = count;
    const int64_t across = padded * units(size), all = layout.at(padded), joined = padded / P::per_unit * layout.width;
    kt = take(across);
    if (backward) vt = take(across), dk = take(all), dv = take(all);
    if constexpr (P::pairs) {
      vj = take(joined);
      if (backward) kj = take(joined);
      if (rows) {
        k = reinterpret_cast<Number*>(take(all / P::per_unit));
        v = reinterpret_cast<Number*>(take(all / P::per_unit));
      }
    } else {
      kj = k = take(all), vj = v = take(all);
    }
    bias = mask ? take(padded) : nullptr;
  }

  // Where joined rows begin; `row` is a multiple of KT.
  int64_t joined_at(const Layout& layout, int64_t row) const {
    return P::pairs ? row / P::per_unit * layout.width : layout.at(row);
  }
};

template <class E> class Head {
 public:
  const MstAttention& p;
  const Geometry geometry;
  const Layout layout;
  const int64_t width;  // of a packed row
  const bool backward;
  KeySet<E> keys, summaries;

  Head(const MstAttention& problem, bool is_backward)
      : p(problem), geometry(problem), layout(problem), width(layout.width), backward(is_backward) {}

  // Places the key sets in memory; false if there is none.
  bool allocate(Scratch& memory) {
    int64_t floats = 0;
    place([&](int64_t n) { return floats += n, static_cast<float*>(nullptr); });
    float* at = memory.floats(floats + 64);
    if (!at) return false;
    place([&](int64_t n) { return (at += n) - n; });
    return true;
  }

  // Makes this the given head; packs the summaries, and each tile of keys when it is first needed.
  void bind(int64_t batch, int64_t key_head) {
    if (batch == batch_ && key_head == key_head_) return;
    batch_ = batch, key_head_ = key_head;
    packed_.assign(keys.padded / KT, 0);
    for (int64_t t = 0; t < summaries.padded / KT; t++)
      pack(summaries, t, geometry.summaries(), p.parts.summary, p.parts.summary - 1);
  }

  // Forgets the head, so that binding it again starts its gradients from zero.
  void release() { batch_ = -1; }

  KeySet<E>& of(Kind kind) { return kind == SUMMARY ? summaries : keys; }

  // Packs what a step of queries [i0, i1) reads.
  void need(const Step& step, int64_t i0, int64_t i1) {
    if (step.kind == RUN) need_keys(step.first, step.first + step.width);
    if (step.kind == ROWWISE)
      for (int64_t n = step.first; n < step.first + step.width && geometry.at_distance(i1 - 1, n) >= 0; n++)
        need_keys(std::max<int64_t>(0, geometry.at_distance(i0, n)), geometry.at_distance(i1 - 1, n) + 1);
  }

  // The n of a rowwise step that query i sees, counted from the step's first: [0, count).
  int64_t rowwise_count(const Step& step, int64_t i) const {
    return std::clamp<int64_t>(geometry.seen(ROWWISE, i).end - step.first, 0, step.width);
  }
  // Where query i's keys of a rowwise step begin in packed rows, if it sees one; they lie -row_step() apart.
  int64_t rowwise_at(const Step& step, int64_t i) const { return layout.at(geometry.at_distance(i, step.first)); }
  int64_t row_step() const { return layout.apart(p.parts.step); }

  // Calls body(first row, rows) for the stretches of a step's rows that lie without a gap.
  template <class Body> void stretches(const Step& step, Body body) const {
    const int most = layout.gaps() ? KT : step.width;
    for (int j = 0; j < step.width; j += most) body(j, most);
  }

  // s[QT][step_keys] = `factor` times the products of the tile's rows x with a step's keys (or values). `tile` rows are
  // real.
  void products(const Step& step, const TileRows<E>& x, int64_t i0, int64_t tile, bool with_values, float factor,
                float* s) {
    if (step.kind == ROWWISE) {
      const auto* rows = with_values ? keys.v : keys.k;
      for (int64_t r = 0; r < tile; r++)
        if (const int64_t count = rowwise_count(step, i0 + r))
          row_dots(x.floats() + r * width, rows + rowwise_at(step, i0 + r), -row_step(), count, width, factor,
                   s + r * step_keys);
      return;
    }
    const KeySet<E>& set = of(step.kind);
    const int64_t units = KeySet<E>::units(p.size);
    const float* from = (with_values ? set.vt : set.kt) + step.first * units;
    for (int t = 0; t < step.width; t += KT)
      product<typename P::unit, false>(QT, KT / L, p.size / P::per_unit, x.along(), width / P::per_unit,
                                       from + t * units, KT, s + t, step_keys, false, factor);
  }

  // Cuts the scores to what each query may see.
  void mask(const Step& step, int64_t i0, int64_t tile, float* s) {
    if (!step.masked && !p.key_mask && tile == QT) return;
    for (int64_t r = 0; r < QT; r++) {
      const int64_t i = i0 + r;
      const Interval seen = r < tile ? geometry.seen(step.kind, i) : Interval{0, 0};
      const float* bias = r < tile ? bias_of(step, i) : nullptr;
      mask_row(s + r * step_keys, step.width, seen.begin - step.first, seen.end - step.first, bias);
    }
  }

 private:
  using P = Packed<E>;
  using Number = typename P::number;
  int64_t batch_ = -1, key_head_ = -1;
  std::vector<uint8_t> packed_;
  float bias_row_[step_keys];
  alignas(64) Number tile_[P::pairs ? KT * 256 : 1];

  template <class Take> void place(Take take) {
    const int64_t count = ceil_div(p.length, KT) * KT, few = ceil_div(geometry.summaries(), KT) * KT;
    const bool mask = p.key_mask != nullptr;
    keys.place(take, count, p.size, layout, backward, geometry.has(ROWWISE), mask);
    summaries.place(take, few, p.size, layout, backward, false, mask);
  }

  void need_keys(int64_t begin, int64_t end) {
    for (int64_t t = begin / KT; t < ceil_div(end, KT); t++)
      if (!packed_[t]) {
        pack(keys, t, p.length, 1, 0);
        packed_[t] = 1;
      }
  }

  // Packs tile t of a set whose row j stands at position j * every + offset, j < count.
  void pack(KeySet<E>& set, int64_t t, int64_t count, int64_t every, int64_t offset) {
    pack_rows(p.k, t, count, every, offset, set.k, set.kj, set.kt, set);
    pack_rows(p.v, t, count, every, offset, set.v, set.vj, set.vt, set);
    if (set.bias)
      for (int64_t row = t * KT; row < (t + 1) * KT; row++) {
        const bool seen = row < count && p.key_mask[batch_ * p.length + row * every + offset];
        set.bias[row] = seen ? 0.0f : -infinity;
      }
    if (!backward) return;
    std::fill_n(set.dk + layout.at(t * KT), KT * width, 0.0f);
    std::fill_n(set.dv + layout.at(t * KT), KT * width, 0.0f);
  }

  // Keys or values of tile t, in the forms that there is a place for.
  void pack_rows(const MstHeads& from, int64_t t, int64_t count, int64_t every, int64_t offset, Number* along,
                 float* joined, float* across, const KeySet<E>& set) {
    const int64_t units = KeySet<E>::units(p.size), apart = P::pairs ? units * P::per_unit : width;
    Number* to = P::pairs ? tile_ : along + layout.at(t * KT);
    for (int64_t j = 0; j < KT; j++) {
      const int64_t row = t * KT + j;
      if (row < count)
        read_row(row_of<const E>(from, batch_, key_head_, row * every + offset), p.size, apart, to + j * apart);
      else
        std::fill_n(to + j * apart, apart, Number{});
    }
    if (across) transpose_tile<typename P::unit>(to, apart, across + t * KT * units);
    if constexpr (P::pairs) {
      if (joined) join_rows(to, apart, KT, width, joined + set.joined_at(layout, t * KT));
      for (int64_t j = 0; along && j < KT; j++)
        std::copy_n(to + j * apart, width, along + layout.at(t * KT + j));
    }
  }

  // What is added to query i's scores, null for nothing.
  const float* bias_of(const Step& step, int64_t i) {
    if (!keys.bias) return nullptr;
    if (step.kind != ROWWISE) return of(step.kind).bias + step.first;
    const int64_t count = rowwise_count(step, i);
    for (int64_t n = 0; n < step.width; n++)
      bias_row_[n] = n < count ? keys.bias[geometry.at_distance(i, step.first + n)] : 0.0f;
    return bias_row_;
  }
};

// The tiles of a split: every `splits`-th one. Queries a multiple of the step apart share their keys at distances, so
// these follow each other.
inline std::vector<int64_t> tiles_of(const Geometry& g, int64_t split, int64_t splits) {
  std::vector<int64_t> tiles;
  for (int64_t t = split; t * QT < g.length; t += splits) tiles.push_back(t * QT);
  const int64_t step = g.parts.step;
  if (step && step % QT == 0)
    std::stable_sort(tiles.begin(), tiles.end(), [&](int64_t a, int64_t b) { return a % step < b % step; });
  return tiles;
}

// An argument that no kernel takes.
inline int check(const MstAttention& p) {
  const bool heads = p.heads > 0 && p.key_heads > 0 && p.heads % p.key_heads == 0;
  if (!heads || p.batch < 1 || p.length < 1 || p.size < 8 || p.size > 256 || p.size % 8) return MST_BAD_SHAPE;
  const MstParts& s = p.parts;
  for (const int64_t number : {s.window, s.chunk, s.first, s.step, s.summary})
    if (number < 0 || number > p.length) return MST_BAD_SHAPE;
  return (s.window && s.chunk) || !(s.window || s.chunk || s.step || s.summary) ? MST_BAD_SHAPE : MST_OK;
}

}  // namespace
}  // namespace mst
