// What csrc/cpu/amx.h computes, emulated or on the processor's own tiles (tests/native/test_amx.py): one product against the
// order of roundings that Intel's manual gives, written out number by number. Prints "ok", or fails.
#include "amx.h"

#include <cmath>
#include <cstdio>

#if !defined(DALLE_FAST_EMULATE_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

using namespace dalle_fast::DALLE_FAST_ISA;

namespace {

constexpr int kDepth = 32, kSide = 16;

// Denormals are zero.
float flushed(float x) { return std::fpclassify(x) == FP_SUBNORMAL ? std::copysign(0.0f, x) : x; }

float number(BFloat16 x) { return flushed(widen(x)); }

// Of a row of a or a column of b: denormals; numbers whose products are about the smallest that are none; large ones, that show
// a denormal which is not zero; and numbers around one, where every sum is rounded.
BFloat16 some_number(uint32_t& state, int line) {
  state = state * 1664525u + 1013904223u;
  const uint32_t bits = state >> 16, exponents[] = {0, 61 + bits % 4, 187, 124 + bits % 4};
  return {static_cast<uint16_t>((bits & 0x8000) | exponents[line % 4] << 7 | ((state >> 8) & 0x7F))};
}

// Zero, denormal or around one.
float some_start(int i, int j) {
  const float scales[] = {0.0f, 0x1p-132f, 0x1p1f};
  return static_cast<float>(i - j) * scales[(i + j) % 3];
}

}  // namespace

int main() {
#if !defined(DALLE_FAST_EMULATE_AMX)
  syscall(SYS_arch_prctl, 0x1023, 18);  // the permission that isa.cpp asks for
#endif
  BFloat16 a[kSide][kDepth], b[kDepth][kSide];
  uint32_t packed[kDepth / 2][kSide], state = 1;
  float c[kSide][kSide];
  for (int i = 0; i < kSide; ++i) {
    for (int k = 0; k < kDepth; ++k) a[i][k] = some_number(state, i), b[k][i] = some_number(state, i);
    for (int j = 0; j < kSide; ++j) c[i][j] = some_start(i, j);
  }
  for (int k = 0; k < kDepth / 2; ++k) {
    const VecU both = pairs(b[2 * k], b[2 * k + 1]);
    memcpy(packed[k], &both, sizeof(both));
  }
  {
    const HeldTiles held;
    tile_load(0, c, sizeof(c[0]));
    tile_load(1, a, sizeof(a[0]));
    tile_load(2, packed, sizeof(packed[0]));
    tile_dpbf16(0, 1, 2);
    tile_store(0, c, sizeof(c[0]));
  }
  for (int i = 0; i < kSide; ++i) {
    for (int j = 0; j < kSide; ++j) {
      float sums[2] = {};
      for (int k = 0; k < kDepth; ++k) sums[k % 2] = flushed(std::fma(number(a[i][k]), number(b[k][j]), sums[k % 2]));
      const float want = flushed(flushed(some_start(i, j)) + flushed(sums[0] + sums[1]));
      if (memcmp(&c[i][j], &want, sizeof(float)) != 0) {
        std::printf("failed: row %d column %d is %a, not %a\n", i, j, c[i][j], want);
        return 1;
      }
    }
  }
  std::printf("ok\n");
}
