// How products with blocks of 1 and 2 are cut.
//
// An active element has its vector of tokens to itself (B = 1) or shares it with one other (B = 2): a load for every
// multiply-add, or every other, whatever the tile. What counts is from where. A chunk of the lines that are loaded,
// transposed to [line][tokens of a tile], is as short as the lists of active blocks allow, so that it stays in L1 or
// close to it. What is done once a list and chunk (reading and writing sums, a branch that is seldom foreseen) sets the
// length of a list. The tile is narrow for the same reason.
#pragma once
#include "common.h"

namespace mst {
namespace {

constexpr int fine_vectors = 4;  // of tokens in a tile
constexpr int64_t fine_tokens = fine_vectors * L;
constexpr int64_t list_elements = 40;            // active elements in a line of W and a chunk, on average
constexpr int64_t least_chunk_bytes = 16 << 10;  // of one tile
constexpr int64_t most_chunk_bytes = 160 << 10;
constexpr int64_t fine_panel_bytes = 128 << 10;  // of the tiles that share a look at W

// Blocks per chunk, a multiple of L or all of them, for `lists` lists that cross `length` blocks each, `active` in all.
inline int64_t fine_chunk(int block, int64_t lists, int64_t length, int64_t active) {
  const int64_t bytes = block * fine_tokens * 4;  // of a tile per block
  const double share = static_cast<double>(active) / static_cast<double>(std::max<int64_t>(1, lists * length));
  const auto wanted = static_cast<int64_t>(list_elements / (block * std::max(share, 0.001)));
  const int64_t n = ceil_div(length, std::clamp(wanted, least_chunk_bytes / bytes, most_chunk_bytes / bytes));
  return n == 1 ? length : ceil_div(ceil_div(length, n), L) * L;
}

// Where each chunk begins in one list: chunks + 1 positions from `begin` on.
inline void cut_list(const int32_t* idx, int64_t begin, int64_t end, int64_t first, int64_t chunk, int64_t chunks,
                     int32_t* cuts) {
  int64_t q = begin;
  for (int64_t c = 0; c < chunks; c++) {
    cuts[c] = static_cast<int32_t>(q);
    while (q < end && idx[q] < first + (c + 1) * chunk) q++;
  }
  cuts[chunks] = static_cast<int32_t>(end);
}

}  // namespace
}  // namespace mst
