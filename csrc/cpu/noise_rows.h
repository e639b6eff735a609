// Gumbel noise in float32, for kernels that add it to logits where they use them: rows (positions) across the lanes.
//
// The words and u are those of philox.h, bit for bit; the two logarithms are float32. Error at most 2^-22 max(1, |noise|):
// more than 2 ulp only where the noise is near 0, far below the rounding of the logit it is added to.
#pragma once

#include "floats.h"
#include "philox.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// Of positive, normal, finite x; relative error below 2^-23 near 1 too.
static inline Vec log_float(Vec x) {
  constexpr int32_t kTwoThirds = 0x3F2AAAAB;
  const VecI from = reinterpret_cast<VecI>(x) - kTwoThirds;
  // x = 2^k (1 + r) with r in [-1/3, 1/3)
  const Vec k = __builtin_convertvector(from >> 23, Vec);
  const Vec r = reinterpret_cast<Vec>(reinterpret_cast<VecI>(x) - (from & ~0x7FFFFF)) - 1.0f;
  // (log1p(r) - r) / r^2, fitted to the least largest error times |r|: 2^-25.
  Vec p = broadcast(0x1.26535ep-3f);
  p = multiply_add(p, r, broadcast(-0x1.3aca84p-3f));
  p = multiply_add(p, r, broadcast(0x1.1d1d32p-3f));
  p = multiply_add(p, r, broadcast(-0x1.5046f4p-3f));
  p = multiply_add(p, r, broadcast(0x1.99ed88p-3f));
  p = multiply_add(p, r, broadcast(-0x1.0013dap-2f));
  p = multiply_add(p, r, broadcast(0x1.5554bep-2f));
  p = multiply_add(p, r, broadcast(-0x1.ffffd8p-2f));
  return multiply_add(k, broadcast(0x1.62e43p-1f), multiply_add(r * r, p, r));
}

// -log(-log(u)) with u = ((word >> 9) + 0.5) * 2^-23.
static inline Vec gumbel_float(VecU words) {
  // 1 + (word >> 9) * 2^-23, and from it u: both exact.
  const Vec u = reinterpret_cast<Vec>((words >> 9) | 0x3F800000) - (1.0f - 0x1p-24f);
  return -log_float(-log_float(u));
}

// The positions of kWidth rows, those of even and of odd lanes apart: philox.h wants one counter in each 64 bits.
struct Positions {
  U64 even, odd;
  explicit Positions(const uint32_t* from) {
    memcpy(&even, from, sizeof(even));
    odd = even >> 32;
  }
};

// noise[i]: of code 4 * quad + i at these positions.
static inline void gumbel_of_quad(uint64_t seed, uint32_t stream, uint64_t quad, const Positions& positions, Vec noise[4]) {
  U64 even[4] = {splat(quad), positions.even, splat(uint64_t{stream}), U64{}};
  U64 odd[4] = {splat(quad), positions.odd, splat(uint64_t{stream}), U64{}};
  philox4x32(even, seed);
  philox4x32(odd, seed);
  for (int i = 0; i < 4; ++i) noise[i] = gumbel_float(reinterpret_cast<VecU>((even[i] & 0xFFFFFFFFu) | (odd[i] << 32)));
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
