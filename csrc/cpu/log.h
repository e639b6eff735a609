// The natural logarithm of doubles, without fused multiply-adds or divisions: bit-equal on every instruction set.
#pragma once

#include "simd.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// x = 2^k m with m in [0.703125, 1.40625), cut into 16 bins by the top bits of m; the bin of 1 is [0.984375, 1.03125).
// kInverse[j] = 1 / (middle of bin j) rounded to float32 (so that m * kInverse is exact for m of 24 bits), 1 for the bin of
// 1; kLogInverse[j] = -log(kInverse[j]).
constexpr double kInverse[16] = {
    0x1.642c86p+0, 0x1.555556p+0, 0x1.47ae14p+0, 0x1.3b13b2p+0, 0x1.2f684cp+0, 0x1.24924ap+0, 0x1.1a7b96p+0, 0x1.111112p+0,
    0x1.084210p+0, 0x1.000000p+0, 0x1.e1e1e2p-1, 0x1.c71c72p-1, 0x1.af286cp-1, 0x1.99999ap-1, 0x1.861862p-1, 0x1.745d18p-1};
constexpr double kLogInverse[16] = {
    -0x1.522ae1b38a3d5p-2, -0x1.269623134db8ap-2, -0x1.f991c3cb3b370p-3, -0x1.a93ed8c8ad9cap-3,
    -0x1.5bf407b543db1p-3, -0x1.1178ee227e458p-3, -0x1.9335e4d594988p-4, -0x1.08599959e39a5p-4,
    -0x1.0415c89e74404p-5, 0x0.0p+0,              0x1.f0a30a01162a7p-5,  0x1.e27074e2af2e8p-4,
    0x1.5ff3060a793d5p-3,  0x1.c8ff7a79a9a26p-3,  0x1.1675c97aba611p-2,  0x1.4618ba21c5ecap-2};
constexpr TwoTables16 kBins = two_tables(kInverse, kLogInverse);
constexpr uint64_t kFirstBin = 0x3fe6800000000000;  // 0.703125
constexpr double kLog2 = 0x1.62e42fefa39efp-1;

// log1p(r) = r + r^2 (p0 + p1 r + ...) for |r| <= 1/32, interpolated at Chebyshev nodes: error below 2^-54.
constexpr double kLog1p[7] = {-0x1.0p-1,
                              0x1.55555555872e4p-2,
                              -0x1.000000002cdd2p-2,
                              0x1.99998d23ae84dp-3,
                              -0x1.55554a1e567b4p-3,
                              0x1.24f5f0d7c0917p-3,
                              -0x1.0059b0f4702dbp-3};

// Of positive, normal, finite x. Error below 2^-52 + half an ulp of the result.
static inline F64 log(F64 x) {
  constexpr uint64_t kBias = 1023;
  const U64 bits = reinterpret_cast<U64>(x);
  const U64 from_first = bits - kFirstBin + (kBias << 52);  // (k + bias) in the exponent, the bin below it
  const U64 biased_k = from_first >> 52;
  const U64 index = (from_first >> 48) & 15;
  const F64 m = reinterpret_cast<F64>(bits - (from_first & ~((uint64_t{1} << 52) - 1)) + (kBias << 52));
  // An integer below 2^52 as a double: the low bits of 2^52.
  const F64 k = reinterpret_cast<F64>(biased_k | 0x4330000000000000) - (0x1p52 + kBias);
  F64 inverse, log_inverse;
  lookup16(kBins, index, inverse, log_inverse);
  const F64 r = m * inverse - 1.0;
  F64 p = splat(kLog1p[6]);
  for (int i = 5; i >= 0; --i) p = p * r + kLog1p[i];
  return k * kLog2 + log_inverse + (r + r * r * p);
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
