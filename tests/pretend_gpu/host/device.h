// The device itself: what is counted, what a host would wait in, memory, streams, and what autograd asks of it. Included
// once, by idle.cpp.
#pragma once

#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/Allocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <c10/util/Exception.h>

#include <chrono>
#include <map>
#include <mutex>
#include <set>
#include <string>
#include <sys/mman.h>
#include <unordered_map>

namespace {

using Clock = std::chrono::steady_clock;

const c10::Device kHere(c10::kCUDA, 0);
constexpr size_t kGranule = 512; // as PyTorch's allocator rounds

std::mutex lock;
std::map<std::string, int64_t> counts;     // operator, or what else happened -> how often
std::unordered_map<void*, size_t> pinned;  // host memory that a device reads by itself
int64_t nanoseconds = 0;                   // spent here, by the outermost calls
bool executes = false;
void (*told)(const char*) = nullptr; // whom to tell of what a host would wait in

thread_local int depth = 0;

// Times what is done here, which no GPU's driver does.
struct Timed {
  Clock::time_point begin = Clock::now();
  Timed() {
    ++depth;
  }
  ~Timed() {
    if (--depth == 0) {
      std::lock_guard<std::mutex> held(lock);
      nanoseconds += std::chrono::duration_cast<std::chrono::nanoseconds>(Clock::now() - begin).count();
    }
  }
};

void note(const std::string& what) {
  std::lock_guard<std::mutex> held(lock);
  ++counts[what];
}

void wait(const std::string& what) {
  note("wait " + what);
  if (told != nullptr) {
    told(what.c_str());
  }
}

// -- memory -----------------------------------------------------------------------------------------------------------

// Memory is kept by exact size and handed out again, the lowest address first as by PyTorch's allocator, so that a step
// that takes and frees what the step before did finds its addresses. Pages are taken when they are written to, and nothing
// writes to most.
std::map<size_t, std::set<void*>> free_blocks;

struct Memory final : c10::Allocator {
  struct Block {
    void* data;
    size_t size;
  };

  static void release(void* context) {
    auto* block = static_cast<Block*>(context);
    {
      std::lock_guard<std::mutex> held(lock);
      free_blocks[block->size].insert(block->data);
    }
    delete block;
  }

  c10::DataPtr allocate(size_t bytes) override {
    if (bytes == 0) {
      return {nullptr, nullptr, &release, kHere};
    }
    const size_t size = (bytes + kGranule - 1) / kGranule * kGranule;
    void* data = nullptr;
    {
      std::lock_guard<std::mutex> held(lock);
      ++counts["allocation"];
      auto& kept = free_blocks[size];
      if (!kept.empty()) {
        data = *kept.begin();
        kept.erase(kept.begin());
      } else {
        ++counts["new memory"];
      }
    }
    if (data == nullptr) {
      data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      TORCH_CHECK(data != MAP_FAILED, "no address space for ", size, " bytes");
    }
    return {data, new Block{data, size}, &release, kHere};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return nullptr;
  }

  void copy_data(void* to, const void* from, size_t bytes) const override {
    default_copy_data(to, from, bytes);
  }
};

Memory allocator;
REGISTER_ALLOCATOR(c10::kCUDA, &allocator)

struct Guard final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override {
    return kHere;
  }
  c10::DeviceIndex deviceCount() const noexcept override {
    return 1; // autograd starts a thread for it, as for a GPU
  }
  c10::Device exchangeDevice(c10::Device) const override {
    return kHere;
  }
  c10::Stream getStream(c10::Device) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kHere);
  }
  c10::Stream getDefaultStream(c10::Device) const override {
    return c10::Stream(c10::Stream::DEFAULT, kHere);
  }
  c10::Stream exchangeStream(c10::Stream) const noexcept override {
    return c10::Stream(c10::Stream::DEFAULT, kHere);
  }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {
    note("event");
  }
  void block(void*, const c10::Stream&) const override {} // streams wait for each other, no host for them
  bool queryEvent(void*) const override {
    return true;
  }
  void destroyEvent(void*, c10::DeviceIndex) const noexcept override {}
  void recordDataPtrOnStream(const c10::DataPtr&, const c10::Stream&) const override {}
  void synchronizeEvent(void*) const override {
    wait("event");
  }
  void synchronizeStream(const c10::Stream&) const override {
    wait("stream");
  }
  void synchronizeDevice(c10::DeviceIndex) const override {
    wait("device");
  }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// Autograd asks these whether there is a device to order streams on.
struct Hooks final : at::CUDAHooksInterface {
  void init() const override {}
  bool hasCUDA() const override {
    return true;
  }
  bool isAvailable() const override {
    return true;
  }
  bool hasPrimaryContext(c10::DeviceIndex) const override {
    return true;
  }
  c10::DeviceIndex deviceCount() const override {
    return 1;
  }
  c10::DeviceIndex getCurrentDevice() const override {
    return 0;
  }
};

// Torch has made hooks that know of no device when it was imported, and keeps them: these take their place, where they lie.
static_assert(sizeof(Hooks) == sizeof(at::CUDAHooksInterface));
const at::CUDAHooksInterface* const hooks =
    new (const_cast<at::CUDAHooksInterface*>(&at::detail::getCUDAHooks())) Hooks();

} // namespace
