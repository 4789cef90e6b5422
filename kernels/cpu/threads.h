// What kernels for few tokens share: memory that a thread keeps, and items that threads take one after the other.
#pragma once
#include <atomic>

#include "common.h"

namespace mst {
namespace {

// Memory of a thread: of one that calls, and of one that works on its part.
Scratch& caller_memory() {
  static thread_local Scratch memory;
  return memory;
}
Scratch& worker_memory() {
  static thread_local Scratch memory;
  return memory;
}

// Runs body(item, scratch) for items [0, items), on up to `threads` threads; false if one got no memory.
template <class Body> bool by_threads(int64_t items, int64_t threads, int64_t scratch_floats, Body body) {
  std::atomic<int64_t> next{0};
  std::atomic<bool> failed{false};
  const auto work = [&] {
    Scratch& memory = worker_memory();
    float* scratch = scratch_floats ? memory.floats(scratch_floats) : nullptr;
    if (scratch_floats && !scratch) failed = true;
    for (int64_t i; !failed && (i = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(i, scratch);
    memory.trim();
  };
  if (threads == 1) {
    work();
  } else {
#pragma omp parallel num_threads(threads)
    work();
  }
  return !failed;
}

}  // namespace
}  // namespace mst
