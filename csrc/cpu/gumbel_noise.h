// gumbel_noise: what the op hands to its kernels.
#pragma once

#include "isa.h"

namespace dalle_fast {

struct GumbelNoise {
  const uint64_t* seeds;  // [n_seeds], 1 or one for each row
  int64_t n_seeds;
  const int64_t* positions;  // [n], taken modulo 2^32
  uint32_t stream;
  int64_t n_codes;
};

}  // namespace dalle_fast

// Codes begin .. end - 1 of one row into out[0 ...]; begin is a multiple of 4.
DALLE_FAST_KERNEL(gumbel_noise_codes, (const GumbelNoise& noise, int64_t row, int64_t begin, int64_t end, float* out),
                  (noise, row, begin, end, out))
DALLE_FAST_KERNEL(philox_words_codes, (const GumbelNoise& noise, int64_t row, int64_t begin, int64_t end, uint32_t* out),
                  (noise, row, begin, end, out))
DALLE_FAST_KERNEL(gumbel_of_words, (const uint32_t* words, int64_t count, float* out), (words, count, out))
// The same by float32 logarithms (noise_rows.h).
DALLE_FAST_KERNEL(gumbel_float_of_words, (const uint32_t* words, int64_t count, float* out), (words, count, out))
