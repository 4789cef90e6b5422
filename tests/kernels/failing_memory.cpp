// What the kernels get memory from, with a switch that lets it run out. Linked with -Bsymbolic into a copy of the
// library, so that nothing else in the process is affected; what is freed was malloc's all the same.
#include <stdlib.h>

#include <atomic>
#include <new>

static std::atomic<long> good{-1};  // allocations still granted; negative: all are
static std::atomic<long> refused{0};

extern "C" __attribute__((visibility("default"))) void grant_allocations(long n) {
  good = n;
  refused = 0;
}
extern "C" __attribute__((visibility("default"))) long refused_allocations() { return refused; }

static void* get(size_t alignment, size_t bytes) {
  long left = good;
  while (left > 0 && !good.compare_exchange_weak(left, left - 1)) {}
  if (left == 0) return refused++, nullptr;
  void* data = nullptr;
  return posix_memalign(&data, alignment < 16 ? 16 : alignment, bytes) ? nullptr : data;
}
static void* get_or_throw(size_t alignment, size_t bytes) {
  void* data = get(alignment, bytes);
  if (!data) throw std::bad_alloc();
  return data;
}

extern "C" void* aligned_alloc(size_t alignment, size_t bytes) noexcept { return get(alignment, bytes); }
void* operator new(size_t bytes) { return get_or_throw(16, bytes); }
void* operator new(size_t bytes, std::align_val_t a) { return get_or_throw(static_cast<size_t>(a), bytes); }
void* operator new(size_t bytes, const std::nothrow_t&) noexcept { return get(16, bytes); }
void* operator new(size_t bytes, std::align_val_t a, const std::nothrow_t&) noexcept {
  return get(static_cast<size_t>(a), bytes);
}
