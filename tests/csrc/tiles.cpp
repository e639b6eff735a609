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

// Bits of all sizes from 2^-126, where products vanish, to 2^64; the last few rows are around one, where all is rounded.
BFloat16 some_number(uint32_t& state, int row) {
  state = state * 1664525u + 1013904223u;
  const uint32_t bits = state >> 16, exponent = row < 12 ? bits % 191 : 120 + bits % 16;
  return {static_cast<uint16_t>((bits & 0x8000) | exponent << 7 | ((state >> 8) & 0x7F))};
}

}  // namespace

int main() {
#if !defined(DALLE_FAST_EMULATE_AMX)
  syscall(SYS_arch_prctl, 0x1023, 18);
#endif
  BFloat16 a[kSide][kDepth], b[kDepth][kSide];
  uint32_t packed[kDepth / 2][kSide], state = 1;
  float c[kSide][kSide], want[kSide][kSide];
  for (int i = 0; i < kSide; ++i) {
    for (int k = 0; k < kDepth; ++k) a[i][k] = some_number(state, i), b[k][i] = some_number(state, 12 - i % 2 * 12);
    for (int j = 0; j < kSide; ++j) want[i][j] = c[i][j] = static_cast<float>(i - j) * 0x1p-127f * (j % 2 ? 1.0f : 0x1p125f);
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
      want[i][j] = flushed(flushed(want[i][j]) + flushed(sums[0] + sums[1]));
      if (memcmp(&c[i][j], &want[i][j], sizeof(float)) != 0) {
        std::printf("failed: row %d column %d is %a, not %a\n", i, j, c[i][j], want[i][j]);
        return 1;
      }
    }
  }
  std::printf("ok\n");
}
