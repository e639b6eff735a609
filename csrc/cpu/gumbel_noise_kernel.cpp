// gumbel_noise for one instruction set. Floor: 4 bytes written a value; about 75 operations on 64-bit lanes a value (20 of
// Philox, 55 of two logarithms), so arithmetic bounds it, not memory.
#include "gumbel_noise.h"

#include <string.h>

#include "noise_rows.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

namespace {

constexpr int kCodes = 4 * kLanes;  // of one call of philox4x32

void words_at(const GumbelNoise& noise, int64_t row, int64_t code, U64 words[4]) {
  const uint64_t seed = noise.seeds[noise.n_seeds == 1 ? 0 : row];
  words[0] = lane_numbers() + static_cast<uint64_t>(code / 4);
  words[1] = splat(static_cast<uint64_t>(noise.positions[row]));
  words[2] = splat(static_cast<uint64_t>(noise.stream));
  words[3] = U64{};
  philox4x32(words, PhiloxKeys(seed));
}

void noise_at(const GumbelNoise& noise, int64_t row, int64_t code, float* out) {
  U64 words[4];
  words_at(noise, row, code, words);
  const F32 values[4] = {gumbel(words[0]), gumbel(words[1]), gumbel(words[2]), gumbel(words[3])};
  store_interleaved(out, values);
}

}  // namespace

void gumbel_noise_codes(const GumbelNoise& noise, int64_t row, int64_t begin, int64_t end, float* out) {
  int64_t code = begin;
  for (; code + kCodes <= end; code += kCodes) noise_at(noise, row, code, out + (code - begin));
  if (code < end) {
    float last[kCodes];
    noise_at(noise, row, code, last);
    memcpy(out + (code - begin), last, sizeof(float) * (end - code));
  }
}

void philox_words_codes(const GumbelNoise& noise, int64_t row, int64_t begin, int64_t end, uint32_t* out) {
  for (int64_t code = begin; code < end; code += kCodes) {
    U64 words[4];
    words_at(noise, row, code, words);
    for (int64_t i = code; i < code + kCodes && i < end; ++i) {
      out[i - begin] = static_cast<uint32_t>(words[i % 4][(i - code) / 4]);
    }
  }
}

void gumbel_of_words(const uint32_t* words, int64_t count, float* out) {
  for (int64_t first = 0; first < count; first += kLanes) {
    U64 lanes{};
    const int64_t width = count - first < kLanes ? count - first : kLanes;
    for (int64_t i = 0; i < width; ++i) lanes[i] = words[first + i];
    const F32 values = gumbel(lanes);
    for (int64_t i = 0; i < width; ++i) out[first + i] = values[i];
  }
}

void gumbel_float_of_words(const uint32_t* words, int64_t count, float* out) {
  for (int64_t first = 0; first < count; first += kWidth) {
    VecU lanes{};
    const int64_t width = count - first < kWidth ? count - first : kWidth;
    for (int64_t i = 0; i < width; ++i) lanes[i] = words[first + i];
    const Vec values = gumbel_float(lanes);
    for (int64_t i = 0; i < width; ++i) out[first + i] = values[i];
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
