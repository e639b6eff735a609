// nearest_code: what the op hands to its kernel.
#pragma once

#include "isa.h"

namespace dalle_fast {

constexpr int kCodeBlock = 48;  // codes at once
constexpr int kCodeRows = kCodeBlock + 8;  // and those behind the last that products compute (product.h)
constexpr int kCodeTile = 64;   // rows at once, across the lanes

struct NearestCode {
  const float* x;         // [n, width]
  int64_t n, width;
  const float* codebook;  // [codes, width]
  int64_t codes;
  int64_t* nearest;  // [n]
};

constexpr int64_t nearest_code_scratch(int64_t width) {
  return (width + 15) / 16 * 16 * 2 * kCodeTile + kCodeTile * kCodeRows + kCodeRows * width;
}

}  // namespace dalle_fast

// Rows kCodeTile * tile and the following.
DALLE_FAST_KERNEL(nearest_code_tile, (const NearestCode& op, int64_t tile, float* scratch), (op, tile, scratch))
