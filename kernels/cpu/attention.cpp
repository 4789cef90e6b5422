// Attention over the parts of a causal pattern, forward: out = softmax(scale q k^T, cut to the parts) v.
//
// Loop nest:
//
//     for each head and share of its tiles of QT queries (threads, dynamic):
//       for each tile of queries:
//         for each step of up to step_keys keys (attention_steps.h):
//           scaled scores of the tile against the step       SIMD over keys, k packed transposed
//           mask, where the step's edges need it
//           online softmax: new maxima, exponentials, sums; earlier results scaled down
//           add the probabilities' product with the values   SIMD over the size of a value
//         divide by the sums and write
//
// Keys and values of a head are packed once by each thread that needs them, tile by tile on demand (attention_pack.h).
// Both products run from registers at 16 multiply-adds for 10 loads with AVX-512 (8 rows by 2 vectors), twice as many
// of bf16 numbers in pairs; a tile of 32 queries does 64 multiply-adds per float that it reads of a packed key or value,
// enough for L2 and L3 alike. Rowwise steps do one multiply-add per number read: they are bound by the cache, which the
// order of the tiles is chosen for.
#include "attention_head.h"

namespace mst {
namespace {

template <class E> struct Forward {
  const MstAttention& p;
  Head<E> head;
  std::vector<Step> steps;
  alignas(64) float scores[QT * step_keys];
  TileRows<E> query;
  alignas(64) float sums[QT * MST_LARGEST_HEAD];  // value_width apart
  alignas(64) float top[QT], lanes[QT * L];  // maxima, and L partial sums of each row's exponentials

  explicit Forward(const MstAttention& problem) : p(problem), head(problem, false) {}

  // Turns scores to exponentials below the new maximum of their row, and scales what came before down to it. NARROW
  // leaves them as bf16 numbers in the first half of their row.
  template <bool NARROW> void soften(const Step& step) {
    for (int r = 0; r < QT; r++) {
      float* s = scores + r * step_keys;
      vf best = load(s);
      for (int j = L; j < step.width; j += L) best = larger(load(s + j), best);
      const float now = std::max(top[r], lanes_max(best)), base = now == -infinity ? 0 : now;
      vf sum{};
      for (int j = 0; j < step.width; j += L) {
        const vf e = exponential(load(s + j) - base);
        sum = sum + e;
#if defined(MST_BF16_PAIRS)
        if constexpr (NARROW) store_half(s + j / 2, narrow(e));
#endif
        if constexpr (!NARROW) store(s + j, e);
      }
      vf before = load(lanes + r * L);
      if (now != top[r]) {
        const vf shrink = exponential(broadcast(top[r] - base));
        before = before * shrink;
        for (int64_t d = 0; d < head.value_width; d += L) {
          float* at = sums + r * head.value_width + d;
          store(at, load(at) * shrink);
        }
        top[r] = now;
      }
      store(lanes + r * L, before + sum);
    }
  }

  void add_values(const Step& step, int64_t i0, int64_t tile) {
    using P = Packed<E>;
    const Rows<E>& v = head.of(step.kind).v;
    const int64_t width = head.value_width;
    if (step.kind == ROWWISE) {
      for (int64_t r = 0; r < tile; r++)
        if (const int64_t count = head.rowwise_count(step, i0 + r))
          row_sums(scores + r * step_keys, v.along + head.rowwise_at(v.layout, step, i0 + r), -head.row_step(v.layout),
                   count, width, sums + r * width);
      return;
    }
    head.stretches(step, [&](int j, int count) {
      product<typename P::unit, false>(QT, width / L, count / P::per_unit, scores + j / P::per_unit, step_keys,
                                       v.joined + v.joined_at(step.first + j), width, sums, width, true);
    });
  }

  void write(int64_t b, int64_t h, int64_t i0, int64_t tile) {
    for (int64_t r = 0; r < tile; r++) {
      const float total = lanes_sum(load(lanes + r * L)), factor = total == 0 ? 0 : 1 / total;
      float* row = sums + r * head.value_width;
      for (int64_t d = 0; d < head.value_width; d += L) store(row + d, load(row + d) * factor);
      convert(row, row_of<E>(p.out, b, h, i0 + r), static_cast<int>(p.value_size));
      p.lse[(b * p.heads + h) * p.length + i0 + r] = total == 0 ? -infinity : top[r] + std::log(total);
    }
  }

  void tile(int64_t b, int64_t h, int64_t i0) {
    const int64_t real = std::min<int64_t>(QT, p.length - i0);
    query.read(p.q, b, h, i0, real, p.size, head.width);
    std::fill_n(sums, QT * head.value_width, 0.0f);
    std::fill_n(top, QT, -infinity);
    std::fill_n(lanes, QT * L, 0.0f);
    head.geometry.steps(i0, i0 + real, steps);
    for (const Step& step : steps) {
      head.need(step, i0, i0 + real);
      head.products(step, query, i0, real, false, p.scale, scores);
      head.mask(step, i0, real, scores);
      if (Packed<E>::pairs && step.kind != ROWWISE)
        soften<Packed<E>::pairs>(step);
      else
        soften<false>(step);
      add_values(step, i0, real);
    }
    write(b, h, i0, real);
  }
};

template <class E> int forward(const MstAttention& p, int threads) {
  const int64_t heads = p.batch * p.heads, splits = heads >= 4 * threads ? 1 : ceil_div(4 * threads, heads);
  int status = MST_OK;
#pragma omp parallel num_threads(threads)
  {
    static thread_local Scratch memory;
    const std::unique_ptr<Forward<E>> worker(new (std::nothrow) Forward<E>(p));
    bool ready = worker && worker->head.allocate(memory);
#pragma omp for schedule(dynamic, 1)
    for (int64_t item = 0; item < heads * splits; item++) {
      if (!ready) continue;
      const int64_t b = item / splits / p.heads, h = item / splits % p.heads;
      ready = within_memory([&] {
        worker->head.bind(b, h / (p.heads / p.key_heads));
        for (const int64_t i0 : tiles_of(worker->head.geometry, item % splits, splits)) worker->tile(b, h, i0);
      });
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

MST_API int mst_attention(const MstAttention* problem) {
  const int status = check(*problem), threads = std::max(1, problem->threads);
  if (status != MST_OK) return status;
  return by_dtype(problem->dtype, [&](auto e) { return forward<typename decltype(e)::type>(*problem, threads); });
}
