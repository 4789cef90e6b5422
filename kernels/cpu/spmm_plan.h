// How a block-sparse product is cut into steps, and how threads take them; see the loop nest of spmm.cpp.
#pragma once
#include <atomic>
#include <thread>
#include <vector>

#include "spmm_pack.h"

namespace mst {
namespace {

constexpr int64_t panel_bytes = 200 << 10;  // of x^T, if that holds a tile: stays in L2 beside W and y
constexpr int64_t chunk_bytes = 640 << 10;  // one tile of x^T; a longer reduction is cut
constexpr int64_t piece_bytes = 8 << 20;    // of packed W, shared by the threads in L3

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
  int64_t most_blocks;  // in a piece
};

Plan make_plan(const Problem& p, int64_t units, int64_t MT) {
  Plan plan;
  plan.cuts = cut_pieces(p, units * p.block);
  plan.most_blocks = 0;
  for (size_t s = 0; s + 1 < plan.cuts.size(); s++)
    plan.most_blocks = std::max<int64_t>(plan.most_blocks, p.lists.ptr[plan.cuts[s + 1]] - p.lists.ptr[plan.cuts[s]]);
  const int64_t tile_row = MT * 4 * units;  // bytes of x^T per reduction block
  plan.chunk = p.red_blocks;
  if (plan.chunk * tile_row > chunk_bytes) plan.chunk = std::max<int64_t>(L, chunk_bytes / tile_row / L * L);
  plan.tiles = ceil_div(p.m, MT);
  plan.tile_size = (plan.chunk * units + L) * MT;
  // Even panels, as many as a multiple of the threads; with fewer tiles than threads, the outputs are split as well.
  const int64_t panels = ceil_div(plan.tiles, std::max<int64_t>(1, panel_bytes / 4 / plan.tile_size));
  plan.panels = std::min(plan.tiles, ceil_div(panels, p.threads) * p.threads);
  plan.splits = plan.tiles < p.threads ? ceil_div(p.threads, plan.tiles) : 1;
  return plan;
}

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

}  // namespace
}  // namespace mst
