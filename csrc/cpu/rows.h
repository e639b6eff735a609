// Rows of float32, bfloat16 or float16 in memory as float32 in registers, and back (round to nearest even).
#pragma once

#include "floats.h"
#include "tile.h"

namespace dalle_fast {
namespace DALLE_FAST_ISA {

// A row in floats, rounded up so that vectors and squares of 4 fit.
constexpr int64_t padded(int64_t width) { return (width + 15) / 16 * 16; }

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

static inline float from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}

static inline uint32_t to_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

// Calls function(T*) with the elements' own type.
template <class Function>
static inline void with_elements(Element element, void* data, const Function& function) {
  switch (element) {
    case Element::float32:
      return function(static_cast<float*>(data));
    case Element::bfloat16:
      return function(static_cast<BFloat16*>(data));
    case Element::float16:
      return function(static_cast<Float16*>(data));
  }
}

static inline float widen(float x) { return x; }
static inline float widen(BFloat16 x) { return from_bits(static_cast<uint32_t>(x.bits) << 16); }
static inline float widen(Float16 x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000) << 16, rest = static_cast<uint32_t>(x.bits & 0x7FFF) << 13;
  if (rest >= 0x0F800000) return from_bits(sign | 0x70000000 | rest);  // infinite, not a number
  return from_bits(sign | to_bits(from_bits(rest) * 0x1p112f));        // denormals too: the product is exact
}

static inline void narrow(float x, float& to) { to = x; }
static inline void narrow(float x, BFloat16& to) {
  const uint32_t bits = to_bits(x);
  to.bits = static_cast<uint16_t>(x != x ? 0x7FC0 : (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}
static inline void narrow(float x, Float16& to) {
  const uint32_t bits = to_bits(x), sign = (bits >> 16) & 0x8000, size = bits & 0x7FFFFFFF;
  if (size > 0x7F800000) {
    to.bits = static_cast<uint16_t>(sign | 0x7E00);
  } else if (size >= 0x477FF000) {  // 65520 rounds to infinity
    to.bits = static_cast<uint16_t>(sign | 0x7C00);
  } else if (size < 0x38800000) {  // denormal: adding 0.5 rounds at 2^-24
    to.bits = static_cast<uint16_t>(sign | (to_bits(from_bits(size) + 0.5f) & 0xFFFF));
  } else {
    to.bits = static_cast<uint16_t>(sign | ((size - 0x38000000 + 0xFFF + ((size >> 13) & 1)) >> 13));
  }
}

// A vector at a time, where the instruction set converts.
static inline Vec load_row_vector(const float* from) { return load(from); }
static inline void store_row_vector(float* to, Vec x) { store(to, x); }

typedef uint16_t Halves __attribute__((vector_size(2 * kWidth)));

static inline Vec load_row_vector(const BFloat16* from) {
  Halves bits;
  memcpy(&bits, from, sizeof(bits));
  return reinterpret_cast<Vec>(__builtin_convertvector(bits, VecU) << 16);
}
static inline void store_row_vector(BFloat16* to, Vec x) {
  const VecU bits = reinterpret_cast<VecU>(x);
  const VecU rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  const Halves halves = __builtin_convertvector(x != x ? VecU{} + 0x7FC0 : rounded, Halves);
  memcpy(to, &halves, sizeof(halves));
}

#if defined(__AVX512F__)
static inline Vec load_row_vector(const Float16* from) {
  return reinterpret_cast<Vec>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from))));
}
static inline void store_row_vector(Float16* to, Vec x) {
  const __m256i halves = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves);
}
#else
static inline Vec load_row_vector(const Float16* from) {
  Vec x;
  for (int i = 0; i < kWidth; ++i) x[i] = widen(from[i]);
  return x;
}
static inline void store_row_vector(Float16* to, Vec x) {
  for (int i = 0; i < kWidth; ++i) narrow(x[i], to[i]);
}
#endif

// `width` elements as floats, zeros behind them up to padded_width.
template <class T>
static inline void load_row(const T* from, int64_t width, int64_t padded_width, float* to) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) store(to + i, load_row_vector(from + i));
  for (; i < width; ++i) to[i] = widen(from[i]);
  for (; i < padded_width; ++i) to[i] = 0.0f;
}

template <class T>
static inline void store_row(T* to, int64_t width, const float* from) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) store_row_vector(to + i, load(from + i));
  for (; i < width; ++i) narrow(from[i], to[i]);
}

// Rows of 16-bit elements that are sums under way: the upper halves of their float32 bits lie where the result will, the lower
// ones beside. What float32 holds stays exact, at half the memory of a second matrix.
static inline Vec join_halves(const uint16_t* upper, const uint16_t* lower) {
  Halves high, low;
  memcpy(&high, upper, sizeof(high));
  memcpy(&low, lower, sizeof(low));
  return reinterpret_cast<Vec>(__builtin_convertvector(high, VecU) << 16 | __builtin_convertvector(low, VecU));
}
static inline void split_halves(Vec x, uint16_t* upper, uint16_t* lower) {
  const VecU bits = reinterpret_cast<VecU>(x);
  const Halves high = __builtin_convertvector(bits >> 16, Halves), low = __builtin_convertvector(bits & 0xFFFF, Halves);
  memcpy(upper, &high, sizeof(high));
  memcpy(lower, &low, sizeof(low));
}

// row += the sum under way; row becomes the sum under way; `lower` is for 16-bit elements alone.
static inline void add_sum(float* row, int64_t width, const float* sum, const uint16_t*) {
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) store(row + i, load(row + i) + load(sum + i));
  for (; i < width; ++i) row[i] += sum[i];
}
template <class T>
static inline void add_sum(float* row, int64_t width, const T* sum, const uint16_t* lower) {
  const uint16_t* const upper = &sum->bits;
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) store(row + i, load(row + i) + join_halves(upper + i, lower + i));
  for (; i < width; ++i) row[i] += from_bits(static_cast<uint32_t>(upper[i]) << 16 | lower[i]);
}
static inline void keep_sum(const float* row, int64_t width, float* sum, uint16_t*) {
  memcpy(sum, row, sizeof(float) * width);
}
template <class T>
static inline void keep_sum(const float* row, int64_t width, T* sum, uint16_t* lower) {
  uint16_t* const upper = &sum->bits;
  int64_t i = 0;
  for (; i + kWidth <= width; i += kWidth) split_halves(load(row + i), upper + i, lower + i);
  for (; i < width; ++i) upper[i] = static_cast<uint16_t>(to_bits(row[i]) >> 16), lower[i] = static_cast<uint16_t>(to_bits(row[i]));
}

// Adds rows, `stride` floats apart, to those of a gradient [.., width] of Element, from row `first` on. Between its first chunk and
// its last the sum under way lies there.
static inline void add_rows(float* rows, int64_t stride, int64_t count, const CodeGradient& gradient, Element element,
                            int64_t width, int64_t first, const ChunkEnds& chunk) {
  with_elements(element, gradient.data, [&](auto* data) {
    for (int64_t i = 0; i < count; ++i) {
      float* const row = rows + i * stride;
      const int64_t at = (first + i) * width;
      uint16_t* const lower = gradient.lower == nullptr ? nullptr : gradient.lower + at;
      if (!chunk.first) add_sum(row, width, data + at, lower);
      if (chunk.last) {
        store_row(data + at, width, row);
      } else {
        keep_sum(row, width, data + at, lower);
      }
    }
  });
}

// Turns the pairs of a padded row by the angles of its position; back: by the opposite angles.
template <bool kBack>
static inline void turn_row(float* row, int64_t padded_width, const float* cosines, const float* sines) {
  for (int64_t i = 0; i < padded_width; i += kWidth) {
    const Vec x = load(row + i), sine = load(sines + i);
    store(row + i, multiply_add(x, load(cosines + i), swap_pairs(x) * (kBack ? -sine : sine)));
  }
}

}  // namespace DALLE_FAST_ISA
}  // namespace dalle_fast
