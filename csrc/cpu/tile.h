// What every op over tiles of rows agrees on.
#pragma once

#include <stdint.h>

namespace dalle_fast {

constexpr int kTile = 64;      // rows at once, across the lanes of vectors (and the bits of a mask)
constexpr int kSpareRows = 8;  // behind every buffer: products compute rows in sixes or eights (product.h)

enum class Element : int32_t { float32 = 0, bfloat16 = 1, float16 = 2 };

constexpr int64_t bytes_of(Element element) { return element == Element::float32 ? 4 : 2; }

// Of Element; while rows come in several chunks, sums of 16-bit elements keep the lower halves of their bits apart (rows.h).
struct CodeGradient {
  void* data;
  uint16_t* lower;
};

// Which chunk of rows it is: with the first a sum begins, with the last it becomes elements.
struct ChunkEnds {
  bool first, last;
};

// count rounded up to a multiple.
constexpr int64_t filled(int64_t count, int64_t multiple) { return (count + multiple - 1) / multiple * multiple; }

// Floats of [channels, kTile], rows across the lanes.
constexpr int64_t tile_columns(int64_t channels) { return (filled(channels, 16) + kSpareRows) * kTile; }

}  // namespace dalle_fast
