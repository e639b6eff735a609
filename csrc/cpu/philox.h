// Philox4x32-10 and the Gumbel noise of its words (dalle_fast/rng.py says the same in plain torch, and is the specification).
#pragma once

#include "log.h"
#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// The keys of the rounds, in memory: operands from there cost no instruction.
struct PhiloxKeys {
  uint64_t first[10], second[10];
  explicit PhiloxKeys(uint64_t seed) {
    uint32_t key0 = static_cast<uint32_t>(seed), key1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      first[round] = key0, second[round] = key1;
      key0 += 0x9E3779B9, key1 += 0xBB67AE85;
    }
  }
};

// x[0..3]: counter words of kLanes counters in, random words out, in the low half of each lane (high halves: anything).
static inline void philox4x32(U64 x[4], const PhiloxKeys& keys) {
  U64 x0 = x[0], x1 = x[1], x2 = x[2], x3 = x[3];
  for (int round = 0; round < 10; ++round) {
    const U64 product0 = multiply_low_words(x0, splat(uint64_t{0xD2511F53}));
    const U64 product1 = multiply_low_words(x2, splat(uint64_t{0xCD9E8D57}));
    x0 = exclusive_or(high_words(product1), x1, splat(keys.first[round]));
    x1 = product1;
    x2 = exclusive_or(high_words(product0), x3, splat(keys.second[round]));
    x3 = product0;
  }
  x[0] = x0, x[1] = x1, x[2] = x2, x[3] = x3;
}

// -log(-log(u)) with u = ((word >> 9) + 0.5) * 2^-23, of the low half of each lane.
static inline F32 gumbel(U64 words) {
  const U64 k = (words & 0xFFFFFFFFu) >> 9;
  const F64 u = (reinterpret_cast<F64>(k | 0x4330000000000000) - (0x1p52 - 0.5)) * 0x1p-23;
  return __builtin_convertvector(-log(-log(u)), F32);
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
