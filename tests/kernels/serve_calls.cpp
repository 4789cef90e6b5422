// Calls kernels for a process that cannot load them, as they are made for another processor: see other_libraries.py.
//
// Reads calls from stdin until it ends, all numbers int64:
//
//     the function's place in abi.h, bytes of its struct, the struct
//     how many pointers of the struct lead anywhere; for each: its offset in the struct, bytes that it leads to, they
//
// and writes the function's status, then what each pointer leads to after the call. Around such memory lie bytes that
// must keep their value: the status of a call that has written beside it is 1.
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#include "abi.h"

namespace {

constexpr int64_t beside = 64;  // bytes; as floats and as bf16 numbers they are NaN
constexpr unsigned char untouched = 0xff;

int64_t call(int64_t function, const void* arguments) {
  switch (function) {
    case 0: return mst_spmm(static_cast<const MstSpmm*>(arguments));
    case 1: return mst_grad_weight(static_cast<const MstGradWeight*>(arguments));
    case 2: return mst_zero_inactive(static_cast<const MstZeroInactive*>(arguments));
    case 3: return mst_block_sumsq(static_cast<const MstBlockSumsq*>(arguments));
    case 4: return mst_attention(static_cast<const MstAttention*>(arguments));
    case 5: return mst_attention_backward(static_cast<const MstAttention*>(arguments));
    case 6: return mst_packed(static_cast<const MstPacked*>(arguments));
  }
  abort();
}

bool read(void* to, int64_t bytes) { return fread(to, 1, bytes, stdin) == static_cast<size_t>(bytes); }

int64_t read_number() {
  int64_t number;
  if (!read(&number, 8)) abort();
  return number;
}

struct Memory {
  int64_t bytes;
  unsigned char* begin;

  explicit Memory(int64_t n) : bytes(n), begin(static_cast<unsigned char*>(malloc(n + 2 * beside)) + beside) {
    memset(begin - beside, untouched, n + 2 * beside);
  }
  bool kept_to() const {
    for (int64_t i = 1; i <= beside; i++)
      if (begin[-i] != untouched || begin[bytes + i - 1] != untouched) return false;
    return true;
  }
};

}  // namespace

int main() {
  for (int64_t function; read(&function, 8);) {
    std::vector<char> arguments(read_number());
    if (!read(arguments.data(), arguments.size())) abort();
    std::vector<Memory> memory;
    for (int64_t left = read_number(); left; left--) {
      const int64_t offset = read_number();
      memory.emplace_back(read_number());
      if (!read(memory.back().begin, memory.back().bytes)) abort();
      memcpy(arguments.data() + offset, &memory.back().begin, sizeof(void*));
    }
    int64_t status = call(function, arguments.data());
    for (const Memory& m : memory)
      if (!m.kept_to()) status = 1;
    fwrite(&status, 8, 1, stdout);
    for (const Memory& m : memory) {
      fwrite(m.begin, 1, m.bytes, stdout);
      free(m.begin - beside);
    }
    fflush(stdout);
  }
}
