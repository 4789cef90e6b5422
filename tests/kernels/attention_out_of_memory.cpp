// Lets memory run out at every single allocation of the attention kernels, one after the other. A call that meets this
// must say so, or do without; whatever gets out of a loop of threads ends the process.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <new>
#include <vector>

#include "abi.h"

static std::atomic<int64_t> left{INT64_MAX};  // allocations until there is no memory

static void* allocate(size_t align, size_t bytes) {
  if (left-- <= 0) throw std::bad_alloc();
  return aligned_alloc(align, (bytes + align - 1) / align * align);
}
void* operator new(size_t bytes) { return allocate(16, bytes); }
void* operator new(size_t bytes, std::align_val_t align) { return allocate(static_cast<size_t>(align), bytes); }
void operator delete(void* p) noexcept { free(p); }
void operator delete(void* p, size_t) noexcept { free(p); }
void operator delete(void* p, std::align_val_t) noexcept { free(p); }
void operator delete(void* p, size_t, std::align_val_t) noexcept { free(p); }

static int failures(int (*kernel)(const MstAttention*), const MstAttention& problem) {
  for (int64_t enough = 0; enough < 1000; enough++) {
    left = enough;
    const int status = kernel(&problem);
    const bool met = left < 0;
    left = INT64_MAX;
    if (status != MST_OK && (status != MST_NO_MEMORY || !met)) return -1;
    if (kernel(&problem) != MST_OK) return -1;
    if (!met) return static_cast<int>(enough);
  }
  return -1;
}

int main() {
  const int64_t heads = 3, length = 300, size = 32;
  std::vector<float> data(heads * length * size, 0.5f), lse(heads * length), spare(data.size());
  const auto tensor = [&](std::vector<float>& of) {
    return MstHeads{of.data(), heads * length * size, length * size, size};
  };
  MstAttention p{};
  p.batch = 1, p.heads = p.key_heads = heads, p.length = length, p.size = size;
  p.parts.window = 40, p.parts.first = 64, p.parts.step = 64;
  p.threads = 2, p.scale = 1, p.lse = lse.data();
  p.q = p.k = p.v = p.grad = tensor(data);
  p.out = p.dq = p.dk = p.dv = tensor(spare);
  const int forward = failures(mst_attention, p), backward = failures(mst_attention_backward, p);
  std::printf("%d %d\n", forward, backward);
  return forward > 2 && backward > 2 ? 0 : 1;
}
