#include "parallel.h"

namespace dalle_fast {

namespace {
ParallelFor torch_parallel_for = nullptr;
}

void set_parallel_for(ParallelFor parallel_for) { torch_parallel_for = parallel_for; }

int32_t parallel_ranges(int64_t count, int64_t grain, RangeFunction function, void* context) {
  if (count <= 0) return 0;
  if (torch_parallel_for == nullptr || count <= grain) {
    function(0, count, context);
    return 0;
  }
  return torch_parallel_for(0, count, grain, function, context);
}

}  // namespace dalle_fast
