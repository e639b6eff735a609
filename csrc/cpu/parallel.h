// The thread pool: torch's own, reached through a function pointer that the loader hands over (dalle_fast/_extension.py), so
// that no second pool competes for the cores and no OpenMP runtime is linked.
#pragma once

#include <atomic>
#include <cstdint>

namespace dalle_fast {

using RangeFunction = void (*)(int64_t begin, int64_t end, void* context);
using ParallelFor = int32_t (*)(int64_t begin, int64_t end, int64_t grain, RangeFunction function, void* context);

void set_parallel_for(ParallelFor parallel_for);  // null: everything runs in the calling thread

// Calls function(begin, end) on disjoint ranges that cover 0 .. count - 1, at least `grain` items each. What an item
// computes must not depend on the range it came in. Returns 0, or torch's error code.
int32_t parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context);

template <class Function>
int32_t parallel_for(int64_t count, int64_t grain, const Function& function) {
  return parallel_ranges(
      count, grain,
      [](int64_t begin, int64_t end, void* context) { (*static_cast<const Function*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&function)));
}

// Calls worker(next) in every thread that has work; next() gives the tasks 0 .. count - 1, each to one thread, and -1 when none
// is left. A thread that the machine slows down takes fewer of them.
template <class Worker>
int32_t parallel_tasks(int64_t count, const Worker& worker) {
  std::atomic<int64_t> taken{0};
  const auto next = [&]() -> int64_t {
    const int64_t task = taken.fetch_add(1, std::memory_order_relaxed);
    return task < count ? task : -1;
  };
  return parallel_for(count, 1, [&](int64_t, int64_t) { worker(next); });
}

}  // namespace dalle_fast
