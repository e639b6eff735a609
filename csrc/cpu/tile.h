// What every op over tiles of rows agrees on.
#pragma once

#include <stdint.h>

namespace dalle_fast {

constexpr int kTile = 64;      // rows at once, across the lanes of vectors (and the bits of a mask)
constexpr int kSpareRows = 8;  // behind every buffer: products compute rows in sixes or eights (product.h)

enum class Element : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

// count rounded up to a multiple.
constexpr int64_t filled(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

}  // namespace dalle_fast
