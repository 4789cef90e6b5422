// Attention over the parts of a causal pattern, backward: dq, dk, dv out of grad, q, k, v, out and lse.
//
// Loop nest:
//
//     for each batch, key head and share of its tiles of QT queries (threads, dynamic):
//       for each query head of the group, each tile of queries:
//         delta = sum of grad * out, by query
//         for each step of up to step_keys keys (attention_steps.h):
//           p = exp(scores - lse), masked                           as the forward pass made them
//           ds = p * (grad . v^T - delta)
//           dv += p^T . grad,   dk += ds^T . q,   dq += ds . k      SIMD over their sizes
//         write dq
//       scatter the summaries' dk and dv, write dk and dv
//     add up the shares' dk and dv, if a head has several
//
// dk and dv belong to one thread at a time, so nothing is atomic. How many shares a head has depends on the shapes
// alone, and so do the results, bit by bit. Five products, each from registers at 16 multiply-adds for 10 loads with
// AVX-512, twice as many of bf16 numbers in pairs; a tile of 32 queries does 27 multiply-adds per float moved, of k, v
// (both ways) and dk, dv (in and out). dq and dk miss the factor of the scores until they are written.
#include "attention_head.h"

namespace mst {
namespace {

template <class E> struct Backward {
  const MstAttention& p;
  Head<E> head;
  std::vector<Step> steps;
  alignas(64) float probabilities[QT * step_keys], slopes[QT * step_keys];  // p and ds
  alignas(64) uint16_t narrow_slopes[Packed<E>::pairs ? QT * step_keys : 1];  // ds once more, along the keys
  TileRows<E> query, grad;
  alignas(64) float dq[QT * MST_LARGEST_HEAD];  // width apart
  alignas(64) float lse[QT], delta[QT];

  explicit Backward(const MstAttention& problem) : p(problem), head(problem, true) {}

  // p from scores, and ds in place of the products of grad and v.
  void differentiate(const Step& step) {
    for (int r = 0; r < QT; r++) {
      float *s = probabilities + r * step_keys, *d = slopes + r * step_keys;
      for (int j = 0; j < step.width; j += L) {
        const vf e = exponential(load(s + j) - lse[r]);
        store(s + j, e);
        store(d + j, e * (load(d + j) - delta[r]));
      }
    }
  }

#if defined(MST_BF16_PAIRS)
  // The same as bf16 numbers: p and ds joined by queries in the first half of their rows, ds along the keys as well.
  void differentiate_narrow(const Step& step) {
    for (int r = 0; r < QT; r += 2) {
      for (int j = 0; j < step.width; j += L) {
        __m256i e[2], d[2];
        MST_UNROLL for (int i = 0; i < 2; i++) {
          const int at = (r + i) * step_keys + j;
          const vf x = exponential(load(probabilities + at) - lse[r + i]);
          e[i] = narrow(x);
          d[i] = narrow(x * (load(slopes + at) - delta[r + i]));
          store_half(narrow_slopes + at, d[i]);
        }
        store_pairs(probabilities + r / 2 * step_keys + j, e[0], e[1]);
        store_pairs(slopes + r / 2 * step_keys + j, d[0], d[1]);
      }
    }
  }
#endif

  void slope(const Step& step) {
#if defined(MST_BF16_PAIRS)
    if constexpr (Packed<E>::pairs)
      if (step.kind != ROWWISE) return differentiate_narrow(step);
#endif
    differentiate(step);
  }

  void accumulate(const Step& step, int64_t i0, int64_t tile) {
    using P = Packed<E>;
    using U = typename P::unit;
    const int64_t width = head.width, value_width = head.value_width;
    const Rows<E>&k = head.of(step.kind).k, &v = head.of(step.kind).v;
    if (step.kind != ROWWISE) {
      const float* along = P::pairs ? reinterpret_cast<const float*>(narrow_slopes) : slopes;
      head.stretches(step, [&](int j, int count) {
        const int64_t row = step.first + j, depth = QT / P::per_unit;
        product<U, true>(count, value_width / L, depth, probabilities + j, step_keys, grad.joined(), value_width,
                         v.grad + v.layout.at(row), value_width, true);
        product<U, true>(count, width / L, depth, slopes + j, step_keys, query.joined(), width,
                         k.grad + k.layout.at(row), width, true);
        product<U, false>(QT, width / L, count / P::per_unit, along + j / P::per_unit, step_keys / P::per_unit,
                          k.joined + k.joined_at(row), width, dq, width, true);
      });
      return;
    }
    for (int64_t r = 0; r < tile; r++) {
      const int64_t count = head.rowwise_count(step, i0 + r);
      if (!count) continue;
      const int64_t key = head.rowwise_at(k.layout, step, i0 + r), value = head.rowwise_at(v.layout, step, i0 + r);
      const int64_t apart = -head.row_step(k.layout), values_apart = -head.row_step(v.layout);
      const float *prob = probabilities + r * step_keys, *slope = slopes + r * step_keys;
      row_updates(prob, grad.floats() + r * value_width, v.grad + value, values_apart, count, value_width);
      row_updates(slope, query.floats() + r * width, k.grad + key, apart, count, width);
      row_sums(slope, k.along + key, apart, count, width, dq + r * width);
    }
  }

  void load_tile(int64_t b, int64_t h, int64_t i0, int64_t real) {
    const int64_t width = head.width, value_width = head.value_width;
    query.read(p.q, b, h, i0, real, p.size, width);
    grad.read(p.grad, b, h, i0, real, p.value_size, value_width);
    query.join(width);
    grad.join(value_width);
    std::fill_n(lse, QT, 0.0f);
    std::fill_n(delta, QT, 0.0f);
    for (int64_t r = 0; r < real; r++) {
      float* out = dq;  // a place for one row, until gradients are summed there
      read_row(row_of<const E>(p.out, b, h, i0 + r), p.value_size, value_width, out);
      vf sum{};
      for (int64_t d = 0; d < value_width; d += L)
        sum = load(grad.floats() + r * value_width + d) * load(out + d) + sum;
      delta[r] = lanes_sum(sum);
      const float log_sum = p.lse[(b * p.heads + h) * p.length + i0 + r];
      lse[r] = log_sum == -infinity ? 0 : log_sum;  // no key: all scores are -inf
    }
    std::fill_n(dq, QT * width, 0.0f);
  }

  void tile(int64_t b, int64_t h, int64_t i0) {
    const int64_t real = std::min<int64_t>(QT, p.length - i0), width = head.width;
    load_tile(b, h, i0, real);
    head.geometry.steps(i0, i0 + real, steps);
    for (const Step& step : steps) {
      head.need(step, i0, i0 + real);
      head.products(step, query, i0, real, false, p.scale, probabilities);
      head.mask(step, i0, real, probabilities);
      head.products(step, grad, i0, real, true, 1, slopes);
      slope(step);
      accumulate(step, i0, real);
    }
    for (int64_t r = 0; r < real; r++) {
      float* row = dq + r * width;
      for (int64_t d = 0; d < width; d += L) store(row + d, load(row + d) * p.scale);
      convert(row, row_of<E>(p.dq, b, h, i0 + r), static_cast<int>(p.size));
    }
  }

  // dk and dv of one share of one key head, left in head.keys.
  void share(int64_t b, int64_t key_head, int64_t split, int64_t splits) {
    head.bind(b, key_head);
    head.need({RUN, 0, static_cast<int>(head.keys.padded), false}, 0, 0);
    const int64_t group = p.heads / p.key_heads;
    const std::vector<int64_t> tiles = tiles_of(head.geometry, split, splits);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++)
      for (const int64_t i0 : tiles) tile(b, h, i0);
    add_summaries(head.keys.k, head.summaries.k);
    add_summaries(head.keys.v, head.summaries.v);
    head.release();
  }

  // Rows [begin, end) of dk and dv, the sum of `splits` shares that lie `apart` floats from each other.
  void write(int64_t b, int64_t key_head, int64_t begin, int64_t end, const float* dk, const float* dv, int64_t splits,
             int64_t apart) {
    float row[MST_LARGEST_HEAD];
    const auto one = [&](const MstHeads& to, const float* from, const Layout& layout, int64_t j, float factor) {
      for (int64_t d = 0; d < layout.width; d += L) {
        vf sum = load(from + layout.at(j) + d);
        for (int64_t s = 1; s < splits; s++) sum = sum + load(from + s * apart + layout.at(j) + d);
        store(row + d, sum * factor);
      }
      convert(row, row_of<E>(to, b, key_head, j), static_cast<int>(layout.size));
    };
    for (int64_t j = begin; j < end; j++) {
      one(p.dk, dk, head.keys.k.layout, j, p.scale);
      one(p.dv, dv, head.keys.v.layout, j, 1);
    }
  }

 private:
  void add_summaries(const Rows<E>& all, const Rows<E>& summaries) {
    for (int64_t m = 0; m < head.geometry.summaries(); m++) {
      float* to = all.grad + all.layout.at((m + 1) * p.parts.summary - 1);
      const float* from = summaries.grad + summaries.layout.at(m);
      for (int64_t d = 0; d < all.layout.width; d++) to[d] += from[d];
    }
  }
};

template <class E> int backward(const MstAttention& p, int threads) {
  constexpr int64_t enough = 8;  // items that keep threads busy, where the queries suffice
  const int64_t heads = p.batch * p.key_heads;
  const int64_t splits = heads >= enough ? 1 : std::min(ceil_div(enough, heads), ceil_div(p.length, 4 * QT));
  const int64_t rows = ceil_div(p.length, KT) * KT;
  const int64_t of_dk = Layout(p.size, p.parts.step).at(rows);  // floats of one share
  const int64_t part = of_dk + Layout(p.value_size, p.parts.step).at(rows);
  std::unique_ptr<float, void (*)(void*)> shares(nullptr, free);
  if (splits > 1) {
    shares.reset(static_cast<float*>(aligned_alloc(64, heads * splits * part * sizeof(float))));
    if (!shares) return MST_NO_MEMORY;
  }
  int status = MST_OK;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch memory;
    const std::unique_ptr<Backward<E>> worker(new (std::nothrow) Backward<E>(p));
    bool ready = worker && worker->head.allocate(memory);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < heads * splits; item++) {
      if (!ready) continue;
      const int64_t b = item / splits / p.key_heads, key_head = item / splits % p.key_heads;
      KeySet<E>& keys = worker->head.keys;
      if (splits > 1) keys.k.grad = shares.get() + item * part, keys.v.grad = keys.k.grad + of_dk;
      ready = within_memory([&] { worker->share(b, key_head, item % splits, splits); });
      if (ready && splits == 1) worker->write(b, key_head, 0, p.length, keys.k.grad, keys.v.grad, 1, 0);
    }
    if (splits > 1) {
#pragma omp for schedule(static)
      for (int64_t item = 0; item < heads * splits; item++) {
        if (!ready) continue;
        const int64_t of = item / splits, s = item % splits;
        const float* dk = shares.get() + of * splits * part;
        worker->write(of / p.key_heads, of % p.key_heads, p.length * s / splits, p.length * (s + 1) / splits, dk,
                      dk + of_dk, splits, part);
      }
    }
    if (!ready) {
#pragma omp atomic write
      status = MST_NO_MEMORY;
    }
    memory.trim();
  }
  return status;
}

}  // namespace
}  // namespace mst

using namespace mst;

MST_API int mst_attention_backward(const MstAttention* problem) {
  const int status = check(*problem), threads = std::max(1, problem->threads);
  if (status != MST_OK) return status;
  return by_dtype(problem->dtype, [&](auto e) { return backward<typename decltype(e)::type>(*problem, threads); });
}
