// The exact GELU, x Phi(x), in float32. Include from *_kernel.cpp alone (isa.h).
#pragma once

#include "floats.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// Of z >= 0; error below 2^-23. Chebyshev interpolation of erf(z) / z over z^2 below kMiddle and of log2(erfc(z)) above it.
static inline Vec erf_of_positive(Vec z) {
  constexpr float kMiddle = 0.95f, kOne = 4.0f;  // from there on it rounds to 1
  const Vec square = z * z;
  Vec below = broadcast(-0x1.341922p-11f);
  below = multiply_add(below, square, broadcast(0x1.45c424p-8f));
  below = multiply_add(below, square, broadcast(-0x1.b64becp-6f));
  below = multiply_add(below, square, broadcast(0x1.ce1622p-4f));
  below = multiply_add(below, square, broadcast(-0x1.8126ccp-2f));
  below = multiply_add(below, square, broadcast(0x1.20dd74p+0f));
  const Vec tail = z < kOne ? z : broadcast(kOne);
  Vec above = broadcast(-0x1.4947b2p-16f);
  above = multiply_add(above, tail, broadcast(0x1.e893e6p-12f));
  above = multiply_add(above, tail, broadcast(-0x1.48d994p-8f));
  above = multiply_add(above, tail, broadcast(0x1.0d5ecep-5f));
  above = multiply_add(above, tail, broadcast(-0x1.3279ecp-3f));
  above = multiply_add(above, tail, broadcast(-0x1.d7a746p-1f));
  above = multiply_add(above, tail, broadcast(-0x1.9ffe7ep+0f));
  above = multiply_add(above, tail, broadcast(-0x1.daa7d6p-11f));
  return z < kMiddle ? below * z : 1.0f - exp2_normal(above);
}

// 1 + erf(x / sqrt(2)): twice the normal distribution.
static inline Vec twice_distribution(Vec x) {
  const Vec z = x * 0x1.6a09e6p-1f;
  const Vec size = reinterpret_cast<Vec>(reinterpret_cast<VecI>(z) & 0x7FFFFFFF);
  const Vec erf = erf_of_positive(size);
  return 1.0f + (z < 0.0f ? -erf : erf);
}

static inline Vec gelu(Vec x) { return x * 0.5f * twice_distribution(x); }

// The normal distribution and its density at x: of them the slope of gelu is made.
struct Normal {
  Vec distribution, density;
  explicit Normal(Vec x)
      : distribution(0.5f * twice_distribution(x)), density(0x1.988454p-2f * exp2(x * x * (-0.5f * kLog2E))) {}
};

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
