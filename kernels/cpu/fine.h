// How products with blocks of 1 and 2 are cut.
//
// An active element has its vector of tokens to itself (B = 1) or shares it with one other (B = 2): a load for every
// multiply-add, or every other, whatever the tile; with bf16 dot products half of that. What counts is from where. A
// chunk of the lines that are loaded, transposed to [line][tokens of a tile], is as short as the lists of active blocks
// allow, so that it stays in L1 or close to it. What is done once a list and chunk (reading and writing sums, a branch
// that is seldom foreseen) sets the length of a list. The tile is narrow for the same reason.
//
// Where the time goes (768 x 768, 4096 tokens, bf16, B = 2, density .1, one thread of a Zen 5): of a product's 2.7 ms
// the tiles took 1.5 (dot products alone would take .9), packing x and writing y .4 each, packing W .4; of the
// gradient's 3.3 ms the rows 1.8, packing a and b 1.3. Since then W is copied without a rounding that changes nothing,
// lines of x are asked for ahead (tokens.h), tokens are joined to pairs before they are transposed, not through memory
// afterwards, and y is written by 32 bytes: .92 of the time in forward and grad-input, .84 in the gradient (.95 and .95
// with B = 1; in float .97 and .93). What is left of packing is how fast x comes from L3 (about 15 GB/s a core).
#pragma once
#include <tuple>

#include "common.h"

namespace mst {
namespace {

constexpr int fine_vectors = 4;                  // of sums, or of a line, in a tile
constexpr int64_t fine_floats = fine_vectors * L;
constexpr int64_t list_elements = 64;            // active elements in a line of W and a chunk, on average
constexpr int64_t list_elements_of_pairs = 96;   // the same, of elements that take half the time
constexpr int64_t least_chunk_bytes = 16 << 10;  // of one tile
constexpr int64_t most_chunk_bytes = 160 << 10;
constexpr int64_t fine_tiles = 2;                // that share a look at W
constexpr int64_t group_bytes = 128 << 10;       // of the other side's lines, or of sums, that meet a chunk in L2

// Blocks per chunk, a multiple of L or all of them, for `lists` lists that cross `length` blocks each, `active` in all.
// floats: of a tile, per block.
template <class U>
int64_t fine_chunk(int block, int64_t floats, int64_t lists, int64_t length, int64_t active) {
  const int64_t bytes = floats * 4, elements = U::per_unit == 2 ? list_elements_of_pairs : list_elements;
  const double share = static_cast<double>(active) / static_cast<double>(std::max<int64_t>(1, lists * length));
  const auto wanted = static_cast<int64_t>(elements / (block * std::max(share, 0.001)));
  const int64_t n = ceil_div(length, std::clamp(wanted, least_chunk_bytes / bytes, most_chunk_bytes / bytes));
  return n == 1 ? length : ceil_div(ceil_div(length, n), L) * L;
}

// Lists are taken in lines of neighbours. A line keeps its positions in the order in which they are met, [chunk][list],
// or each list would wait for memory in every chunk.
constexpr int64_t line_lists = 32;

// Lists that meet a chunk before the next one does, with so many floats of a tile each: whole lines.
inline int64_t fine_group(int64_t floats) {
  return ceil_div(group_bytes / (fine_tiles * floats * 4), line_lists) * line_lists;
}

// Calls visit(i, q) for the positions q that range(i) gives, of lists [i0, i1), in that order; chunks count from
// `first`. cuts[c * line_lists + i - i0] becomes the number of those before list i in chunk c; one more is for the end.
template <class RangeOf, class Visit>
void arrange_line(const int32_t* idx, int64_t i0, int64_t i1, int64_t first, int64_t chunk, int64_t chunks,
                  RangeOf range, int32_t* cuts, Visit visit) {
  int64_t at[line_lists], end[line_lists];
  for (int64_t i = i0; i < i1; i++) std::tie(at[i - i0], end[i - i0]) = range(i);
  int32_t n = 0;
  for (int64_t c = 0; c < chunks; c++)
    for (int64_t k = 0; k < line_lists; k++) {
      *cuts++ = n;
      if (k >= i1 - i0) continue;
      for (const int64_t to = first + (c + 1) * chunk; at[k] < end[k] && idx[at[k]] < to; at[k]++, n++)
        visit(i0 + k, at[k]);
    }
  *cuts = n;
}

}  // namespace
}  // namespace mst
