// nearest_code: what the op hands to its kernel.
#pragma once

#include "isa.h"
#include "tile.h"

namespace dalle_fast {

constexpr int kCodeBlock = 48;  // codes at once
constexpr int kCodeRows = kCodeBlock + kSpareRows;

struct NearestCode {
  const float* x;         // [n, width]
  int64_t n, width;
  const float* codebook;  // [codes, width]
  int64_t codes;
  int64_t* nearest;  // [n]
};

constexpr int64_t nearest_code_scratch(int64_t width) {
  return (width + 15) / 16 * 16 * 2 * kTile + kTile * kCodeRows + kCodeRows * width;
}

}  // namespace dalle_fast

// Rows kTile * tile and the following.
DALLE_FAST_KERNEL(nearest_code_tile, (const NearestCode& op, int64_t tile, float* scratch), (op, tile, scratch))
