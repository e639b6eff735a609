// Gumbel noise in float32, for kernels that add it to logits where they use them: rows (positions) across the lanes.
//
// The words and u are those of philox.h, bit for bit; the two logarithms are float32. Error at most 2^-22 max(1, |noise|):
// more than 2 ulp only where the noise is near 0, far below the rounding of the logit it is added to.
#pragma once

#include "floats.h"
#include "philox.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// -log(-log(u)) with u = ((word >> 9) + 0.5) * 2^-23.
static inline Vec gumbel_float(VecU words) {
  // 1 + (word >> 9) * 2^-23, and from it u: both exact.
  const Vec u = reinterpret_cast<Vec>((words >> 9) | 0x3F800000) - (1.0f - 0x1p-24f);
  return -log_float(-log_float(u));
}

// noise [count, rows]: of codes first .. first + count - 1 (first a multiple of 4, memory for a multiple of 4 of them) at
// these positions, as many as rows, a multiple of kWidth. Words and logarithms in loops of their own: each is a long chain, and
// together they leave a processor no room to overlap the next.
static inline void gumbel_rows(uint64_t seed, uint32_t stream, const uint32_t* positions, int rows, int64_t first,
                               int64_t count, float* noise) {
  const PhiloxKeys keys(seed);
  for (int row = 0; row < rows; row += kWidth) {
    // philox.h wants one counter in each 64 bits: rows of even and of odd lanes apart.
    U64 at;
    memcpy(&at, positions + row, sizeof(at));
    for (int64_t quad = 0; quad < count; quad += 4) {
      const U64 block = splat(static_cast<uint64_t>((first + quad) / 4));
      U64 even[4] = {block, at, splat(uint64_t{stream}), U64{}};
      U64 odd[4] = {block, at >> 32, splat(uint64_t{stream}), U64{}};
      philox4x32(even, keys);
      philox4x32(odd, keys);
      for (int i = 0; i < 4; ++i) {
        const U64 words = (even[i] & 0xFFFFFFFFu) | (odd[i] << 32);
        memcpy(noise + (quad + i) * rows + row, &words, sizeof(words));
      }
    }
  }
  for (int64_t i = 0; i < count * rows; i += kWidth) {
    VecU words;
    memcpy(&words, noise + i, sizeof(words));
    store(noise + i, gumbel_float(words));
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
