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
  int64_t size, width, tile;

  Layout(int64_t numbers, int64_t step) : size(numbers), width(ceil_div(size, L) * L), tile(KT * width) {
    if (step && step % KT == 0) tile += ceil_div(width * KT / step, L) * L;
  }
  bool gaps() const { return tile != KT * width; }
  int64_t at(int64_t row) const { return row / KT * tile + row % KT * width; }
  // The distance of rows whose numbers differ by the step: there are gaps only where it is a multiple of KT.
  int64_t apart(int64_t step) const { return gaps() ? step / KT * tile : step * width; }
};

// Keys, or values, in the forms of attention_pack.h. Rows are padded with zeros, and so is their number to a multiple of
// KT.
template <class E> struct Rows {
  using P = Packed<E>;
  using Number = typename P::number;
  Layout layout;
  int64_t units;            // of a tile across: what a row holds, in whole vectors
  float* across = nullptr;  // tile by tile
  float* joined = nullptr;
  Number* along = nullptr;
  float* grad = nullptr;

  explicit Rows(const Layout& rows) : layout(rows), units(ceil_div(rows.size, L * P::per_unit) * L) {}

  // Takes the forms along that are wanted for `count` rows.
  template <class Take> void place(Take take, int64_t count, bool paired, bool rowwise) {
    const int64_t all = layout.at(count);
    if constexpr (P::pairs) {
      if (paired) joined = take(count / P::per_unit * layout.width);
      if (rowwise) along = reinterpret_cast<Number*>(take(all / P::per_unit));
    } else {
      joined = along = take(all);
    }
  }

  // Where joined rows begin; `row` is a multiple of KT.
  int64_t joined_at(int64_t row) const { return P::pairs ? row / P::per_unit * layout.width : layout.at(row); }
};

// Keys that steps count through, with their values: all of a head's, or its summaries.
template <class E> struct KeySet {
  Rows<E> k, v;
  int64_t padded = 0;
  float* bias = nullptr;  // 0, or -inf for a key that is masked out; null without a mask

  KeySet(const Layout& keys, const Layout& values) : k(keys), v(values) {}

  template <class Take> void place(Take take, int64_t count, bool backward, bool rowwise, bool mask) {
    padded = count;
    k.across = take(count * k.units);
    if (backward) {
      v.across = take(count * v.units);
      k.grad = take(k.layout.at(count));
      v.grad = take(v.layout.at(count));
    }
    k.place(take, count, backward, rowwise);
    v.place(take, count, true, rowwise);
    bias = mask ? take(padded) : nullptr;
  }
};

template <class E> class Head {
 public:
  const MstAttention& p;
  const Geometry geometry;
  KeySet<E> keys, summaries;
  const int64_t width, value_width;  // of a packed row
  const bool backward;

  Head(const MstAttention& problem, bool is_backward)
      : p(problem),
        geometry(problem),
        keys(Layout(p.size, p.parts.step), Layout(p.value_size, p.parts.step)),
        summaries(keys),
        width(keys.k.layout.width),
        value_width(keys.v.layout.width),
        backward(is_backward) {}

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
  // Where query i's keys (or values) of a rowwise step begin in packed rows, if it sees one; they lie -row_step() apart.
  int64_t rowwise_at(const Layout& rows, const Step& step, int64_t i) const {
    return rows.at(geometry.at_distance(i, step.first));
  }
  int64_t row_step(const Layout& rows) const { return rows.apart(p.parts.step); }

  // Calls body(first row, rows) for the stretches of a step's rows that lie without a gap, of keys and values alike.
  template <class Body> void stretches(const Step& step, Body body) const {
    const int most = keys.k.layout.gaps() ? KT : step.width;
    for (int j = 0; j < step.width; j += most) body(j, most);
  }

  // s[QT][step_keys] = `factor` times the products of the tile's rows x with a step's keys (or values). `tile` rows are
  // real.
  void products(const Step& step, const TileRows<E>& x, int64_t i0, int64_t tile, bool with_values, float factor,
                float* s) {
    const Rows<E>& rows = with_values ? of(step.kind).v : of(step.kind).k;
    const Layout& layout = rows.layout;
    if (step.kind == ROWWISE) {
      for (int64_t r = 0; r < tile; r++)
        if (const int64_t count = rowwise_count(step, i0 + r))
          row_dots(x.floats() + r * layout.width, rows.along + rowwise_at(layout, step, i0 + r), -row_step(layout),
                   count, layout.width, factor, s + r * step_keys);
      return;
    }
    const float* from = rows.across + step.first * rows.units;
    for (int t = 0; t < step.width; t += KT)
      product<typename P::unit, false>(QT, KT / L, ceil_div(layout.size, P::per_unit), x.along(),
                                       layout.width / P::per_unit, from + t * rows.units, KT, s + t, step_keys, false,
                                       factor);
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
  alignas(64) Number tile_[P::pairs ? KT * MST_LARGEST_HEAD : 1];

  template <class Take> void place(Take take) {
    const int64_t count = ceil_div(p.length, KT) * KT, few = ceil_div(geometry.summaries(), KT) * KT;
    const bool mask = p.key_mask != nullptr;
    keys.place(take, count, backward, geometry.has(ROWWISE), mask);
    summaries.place(take, few, backward, false, mask);
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
    pack_rows(p.k, t, count, every, offset, set.k);
    pack_rows(p.v, t, count, every, offset, set.v);
    if (set.bias)
      for (int64_t row = t * KT; row < (t + 1) * KT; row++) {
        const bool seen = row < count && p.key_mask[batch_ * p.length + row * every + offset];
        set.bias[row] = seen ? 0.0f : -infinity;
      }
    if (!backward) return;
    for (const Rows<E>* rows : {&set.k, &set.v})
      std::fill_n(rows->grad + rows->layout.at(t * KT), KT * rows->layout.width, 0.0f);
  }

  // Keys or values of tile t, in the forms that there is a place for.
  void pack_rows(const MstHeads& from, int64_t t, int64_t count, int64_t every, int64_t offset, const Rows<E>& rows) {
    const Layout& layout = rows.layout;
    const int64_t wide = layout.width, apart = P::pairs ? rows.units * P::per_unit : wide;
    Number* to = P::pairs ? tile_ : rows.along + layout.at(t * KT);
    for (int64_t j = 0; j < KT; j++) {
      const int64_t row = t * KT + j;
      if (row < count)
        read_row(row_of<const E>(from, batch_, key_head_, row * every + offset), layout.size, apart, to + j * apart);
      else
        std::fill_n(to + j * apart, apart, Number{});
    }
    if (rows.across) transpose_tile<typename P::unit>(to, apart, rows.across + t * KT * rows.units);
    if constexpr (P::pairs) {
      if (rows.joined) join_rows(to, apart, KT, wide, rows.joined + rows.joined_at(t * KT));
      for (int64_t j = 0; rows.along && j < KT; j++)
        std::copy_n(to + j * apart, wide, rows.along + layout.at(t * KT + j));
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
  if (!heads || p.batch < 1 || p.length < 1) return MST_BAD_SHAPE;
  for (const int64_t size : {p.size, p.value_size})
    if (size < 1 || size > MST_LARGEST_HEAD) return MST_BAD_SHAPE;
  const MstParts& s = p.parts;
  for (const int64_t number : {s.window, s.chunk, s.first, s.step, s.summary})
    if (number < 0 || number > p.length) return MST_BAD_SHAPE;
  return (s.window && s.chunk) || !(s.window || s.chunk || s.step || s.summary) ? MST_BAD_SHAPE : MST_OK;
}

}  // namespace
}  // namespace mst
