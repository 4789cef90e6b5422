// How a block-sparse product is cut into steps, and how threads take them; see the loop nest of spmm.cpp.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "spmm_pack.h"

namespace mst {
namespace {

constexpr int64_t piece_bytes = 8 << 20;  // of packed W, shared by the threads in L3

// ---- the plan ------------------------------------------------------------------------------------------------------

// Cuts the outputs so that the packed blocks of each piece stay within piece_bytes (but at least one output block).
std::vector<int64_t> cut_pieces(const Problem& p, int64_t block_floats) {
  std::vector<int64_t> cuts{0};
  const int64_t limit = std::max<int64_t>(1, piece_bytes / 4 / block_floats);
  for (int64_t i = 0; i < p.out_blocks; i++)
    if (p.lists.ptr[i + 1] - p.lists.ptr[cuts.back()] > limit && i > cuts.back()) cuts.push_back(i);
  cuts.push_back(p.out_blocks);
  return cuts;
}

// How a call is cut into steps.
struct Plan {
  std::vector<int64_t> cuts;  // pieces of outputs
  int64_t chunk, tile_size;   // reduction blocks per chunk, floats of one tile of x^T
  int64_t tiles, panels, splits;

  int64_t panel_tiles() const { return ceil_div(tiles, panels); }  // at most
};

// Floats of a packed block, tokens and floats of a tile of x^T, reduction blocks per chunk (a multiple of L, or all), bytes
// of x^T per panel; whether tiles may be smaller, so that few of them keep all threads at work.
Plan make_plan(const Problem& p, int64_t block_floats, int64_t MT, int64_t tile_size, int64_t chunk,
               int64_t panel_bytes, bool smaller) {
  Plan plan;
  plan.cuts = cut_pieces(p, block_floats);
  plan.chunk = chunk;
  plan.tiles = ceil_div(p.m, MT);
  if (smaller && plan.tiles > p.threads && plan.tiles < 4 * p.threads)
    plan.tiles = std::min(ceil_div(p.m, static_cast<int64_t>(L)), ceil_div(plan.tiles, p.threads) * p.threads);
  plan.tile_size = tile_size;
  // Even panels, as many as a multiple of the threads; with fewer tiles than threads, the outputs are split as well.
  const int64_t panels = ceil_div(plan.tiles, std::max<int64_t>(1, panel_bytes / 4 / plan.tile_size));
  plan.panels = std::min(plan.tiles, ceil_div(panels, p.threads) * p.threads);
  plan.splits = plan.tiles < p.threads ? ceil_div(p.threads, plan.tiles) : 1;
  return plan;
}

// A piece of outputs with its packed W.
struct Piece {
  int64_t begin, end;  // output blocks
  float* w;
  int64_t w_base;  // lists.ptr[begin]
};

// ---- the steps -----------------------------------------------------------------------------------------------------

// Hands out the steps of a call in order. A step waits until all steps before some ticket are done, not until all
// threads have arrived: a thread that another process keeps from running then delays nobody but at the very end.
class Tickets {
 public:
  int64_t next() { return taken_.fetch_add(1, std::memory_order_relaxed); }
  // Finishes the step in hand and takes another.
  int64_t take_next() {
    done_.fetch_add(1, std::memory_order_release);
    return next();
  }
  // Waits until `steps` steps are done. Only right where no step beyond them can be done yet.
  void wait_for(int64_t steps) const {
    for (int spins = 0; done_.load(std::memory_order_acquire) < steps; spins++)
      if (spins > 1000) std::this_thread::yield();
  }

 private:
  std::atomic<int64_t> taken_{0}, done_{0};
};

// A kernel packs the output blocks of a piece, all threads together, and then runs panels of token tiles [t0, t1) on
// the output blocks [o0, o1), in memory of the thread:
//
//     pack_rows                                           output blocks packed at a time
//     int64_t packed_floats(begin, end)                   of the packed output blocks [begin, end)
//     int64_t scratch_floats(piece)                       for a panel
//     void pack(piece, i0, i1)                            output blocks [i0, i1), pack_rows of them or up to the end
//     void panel(piece, t0, t1, o0, o1, scratch)

// One thread's share of the steps. Returns false if it could not get memory.
template <class Kernel> bool work(const Kernel& kernel, Tickets& tickets, float* w) {
  static thread_local Scratch memory;
  const Problem& p = kernel.p;
  const Plan& plan = kernel.plan;
  const int64_t items = plan.panels * plan.splits;
  bool ok = true;
  int64_t ticket = tickets.next(), first = 0;  // `first`: tickets of earlier pieces
  for (size_t s = 0; s + 1 < plan.cuts.size(); s++) {
    const Piece piece{plan.cuts[s], plan.cuts[s + 1], w, p.lists.ptr[plan.cuts[s]]};
    const int64_t n = piece.end - piece.begin, packs = ceil_div(n, kernel.pack_rows);
    for (; ticket < first + packs; ticket = tickets.take_next()) {
      tickets.wait_for(first);  // the packed memory is free
      const int64_t i0 = piece.begin + (ticket - first) * kernel.pack_rows;
      kernel.pack(piece, i0, std::min(piece.end, i0 + kernel.pack_rows));
    }
    const bool any = ticket < first + packs + items;
    float* scratch = any ? memory.floats(kernel.scratch_floats(piece)) : nullptr;
    for (; ticket < first + packs + items; ticket = tickets.take_next()) {
      const int64_t item = ticket - first - packs, panel = item / plan.splits, part = item % plan.splits;
      tickets.wait_for(first + packs);  // all of the piece is packed
      ok = ok && scratch;
      if (!ok) continue;
      kernel.panel(piece, panel * plan.tiles / plan.panels, (panel + 1) * plan.tiles / plan.panels,
                   piece.begin + part * n / plan.splits, piece.begin + (part + 1) * n / plan.splits, scratch);
    }
    first += packs + items;
  }
  memory.trim();
  return ok;
}

template <class Kernel> int run_steps(const Kernel& kernel) {
  static thread_local Scratch packed_w;
  const std::vector<int64_t>& cuts = kernel.plan.cuts;
  int64_t most = 0;
  for (size_t s = 0; s + 1 < cuts.size(); s++) most = std::max(most, kernel.packed_floats(cuts[s], cuts[s + 1]));
  float* w = packed_w.floats(most + 64);
  if (!w) return MST_NO_MEMORY;
  Tickets tickets;
  std::atomic<bool> failed{false};
#pragma omp parallel num_threads(kernel.p.threads)
  if (!work(kernel, tickets, w)) failed = true;
  packed_w.trim();
  return failed ? MST_NO_MEMORY : MST_OK;
}

}  // namespace
}  // namespace mst
