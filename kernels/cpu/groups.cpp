// Many products that do not wait for each other, as those of experts: of few tokens each, or of one or two.
//
//     products of more than a thread's share of the work, one after the other:   all threads
//     the others, the largest first (threads, dynamic):                          one thread each
//
// Within a product of few tokens threads wait for each other as often as in a large one, when W is packed and at the end:
// of 64 products of 32 tokens with 1024 x 512 bf16 weights, density .2, two threads did 1.75 times what one did, of 256 x
// 128 ones 1.2 times. A thread that has a product to itself waits for nobody until all are done.
#include <atomic>
#include <numeric>
#include <vector>

#include "common.h"

namespace mst {
namespace {

constexpr int64_t packing = 16;  // tokens whose products take about as long as packing the blocks does

template <class Call> int64_t work_of(const Call& call) { return call.index[0] * (call.m + packing); }

// Runs all calls; returns the first error there was.
template <class Call> int run_all(const Call* calls, int64_t count, int threads, int (*run)(const Call*)) {
  std::vector<int64_t> order(count);
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return work_of(calls[a]) > work_of(calls[b]); });
  int64_t total = 0, together = 0;
  for (int64_t i = 0; i < count; i++) total += work_of(calls[i]);
  std::atomic<int> failed{MST_OK};
  const auto one = [&](int64_t at, int own) {
    Call call = calls[order[at]];
    call.threads = own;
    const int status = run(&call);
    if (status != MST_OK) failed = status;
  };
  for (; together < count && (threads == 1 || work_of(calls[order[together]]) > total / threads); together++)
    one(together, threads);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (together < count)
  for (int64_t at = together; at < count; at++) one(at, 1);
  return failed;
}

template <class Call> int run_within_memory(const Call* calls, int64_t count, int threads, int (*run)(const Call*)) {
  int status = MST_NO_MEMORY;
  within_memory([&] { status = run_all(calls, count, threads, run); });
  return status;
}

}  // namespace
}  // namespace mst

using namespace mst;

MST_API int mst_spmm_groups(const MstSpmmGroups* arguments) {
  return run_within_memory(arguments->products, arguments->count, arguments->threads, mst_spmm);
}

MST_API int mst_grad_weight_groups(const MstGradWeightGroups* arguments) {
  return run_within_memory(arguments->products, arguments->count, arguments->threads, mst_grad_weight);
}
