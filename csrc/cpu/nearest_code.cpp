// nearest_code: parallel over tiles of rows.
#include "nearest_code.h"

#include "exports.h"
#include "parallel.h"
#include "scratch.h"

int32_t dalle_fast_nearest_code(const float* x, int64_t n, int64_t width, const float* codebook, int64_t codes,
                                int64_t* nearest) {
  using namespace dalle_fast;
  const NearestCode op{x, n, width, codebook, codes, nearest};
  return parallel_tasks((n + kTile - 1) / kTile, [&](auto next) {
    float* const scratch = of_tasks.take(nearest_code_scratch(width));
    for (int64_t tile; (tile = next()) >= 0;) nearest_code_tile(op, tile, scratch);
  });
}
